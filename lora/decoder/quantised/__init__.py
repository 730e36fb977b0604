"""Frozen linears whose weights are stored in fewer bits: fp8, int8 and nf4."""
