"""Flags: made from the fields of configs, and those that several commands share."""
