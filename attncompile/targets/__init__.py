"""What a compiled model is built into: one file a target. Targets import ``core`` only."""
