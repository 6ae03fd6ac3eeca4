"""What a model is: its hook points and modules, their names, axes and sizes, and its weights.

Nothing here knows of captures or of data sets.
"""
