"""Multi-adapter training: K adapters stacked on one frozen base, trained in one pass."""
