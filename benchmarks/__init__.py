"""Benchmarks of capturing activations of a model; see README.md."""
