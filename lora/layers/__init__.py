"""Layers with LoRA beside `LoRALinear`, and token tables with trainable rows."""
