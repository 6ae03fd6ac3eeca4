"""The life of a capture: sites settled, hooks on, forwards watched and stopped, hooks off.

Nothing here knows of data sets.
"""
