"""Tables, plots and files of the results, and whether they reach their targets."""
