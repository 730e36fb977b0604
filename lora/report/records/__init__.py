"""Run directories read into the records that a report shows."""
