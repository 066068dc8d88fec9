"""Graph passes: load, normalise, detect (with masks and grid), extract, replace. Each imports ``core`` only."""
