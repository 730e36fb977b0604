"""The hand-written step over frozen weights that are split over processes."""
