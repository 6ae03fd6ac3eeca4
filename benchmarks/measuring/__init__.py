"""Measure the memory and time of a way, each case in its own process."""
