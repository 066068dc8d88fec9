"""Windows over a sequence or a grid: see README.md."""
