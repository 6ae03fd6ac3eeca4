"""A data set on disk: its layout, and reading, shuffling and converting it.

Nothing here knows of captures.
"""
