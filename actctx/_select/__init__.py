"""From an activation to the part of it that is kept: slices, real tokens, casts and moves."""
