"""Apply LoRA to a model, remove it, merge it, and save and load adapters in PEFT's format."""
