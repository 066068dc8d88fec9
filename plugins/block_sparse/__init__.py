"""Any mask at fixed lengths, without the keys that it hides: see README.md."""
