"""The ways to get activations that are compared, and the tables that they stand in."""
