"""A run's checkpoints, listed and opened as adapters: `runs/orders@500`, `@best`, `@last`."""
