"""Dense attention as the standard op: see README.md."""
