"""The command line: its commands and their options, loading a model, and printing."""
