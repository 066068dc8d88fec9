"""Lists of blocks that are chosen on the device, anew for each input: see README.md."""
