"""The compared ways to get activations, and their tables."""
