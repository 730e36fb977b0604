"""Scores of answers: labels, JSON fields, overlap with the references."""
