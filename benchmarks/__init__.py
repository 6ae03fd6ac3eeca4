"""What it costs to get one activation of a model; see README.md."""
