"""The commands of a first run: example data, and the demo."""
