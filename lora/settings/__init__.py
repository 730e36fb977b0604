"""Names of settings: former ones, and those of other tools."""
