"""Frozen linears whose weights are stored in fewer bits: fp8 and nf4."""
