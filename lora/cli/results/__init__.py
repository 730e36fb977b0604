"""Commands on what runs have left."""
