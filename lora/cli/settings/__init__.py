"""Commands on files of settings."""
