"""The network alone: architecture from config.json, attention, blocks, KV cache, fp8 linears."""
