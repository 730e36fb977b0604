"""Quantised weights unpacked on a GPU: Triton kernels, each the fast twin of a plain function."""
