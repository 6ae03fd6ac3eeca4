"""The selected part of an activation: slices, real tokens, casts and moves."""
