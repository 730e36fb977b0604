"""Example data that come with the package, for a first run: made from word lists, no download."""
