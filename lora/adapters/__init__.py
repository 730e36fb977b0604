"""LoRA on a whole model: applied, removed, merged, saved and loaded in PEFT's file format."""
