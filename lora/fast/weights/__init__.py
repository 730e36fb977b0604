"""Weights of the hand-written step: frozen and adapted linears, flat storage, the AdamW update."""
