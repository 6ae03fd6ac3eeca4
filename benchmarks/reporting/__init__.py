"""Tables, plots and files of what was measured, and whether it reaches its targets."""
