"""Reads run directories into the summaries that a report shows."""
