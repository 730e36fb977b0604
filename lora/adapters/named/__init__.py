"""Several adapters on one model, under names: one is active, the others wait beside the model."""
