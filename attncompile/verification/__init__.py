"""The parts of verification; ``attncompile.verify`` is the face that others import."""
