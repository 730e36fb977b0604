"""What Python's own tools show of the package: lazy names, callable packages, texts for `help`."""
