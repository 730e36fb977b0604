"""Causal language models of transformers behind the interface that all jobs know."""
