"""Layers with LoRA other than `LoRALinear`: Conv1D, fused and fp8 linears, embedding rows."""
