"""The life of a capture: settle sites, add hooks, watch and stop forwards, remove hooks.

Nothing here depends on data sets.
"""
