"""The hand-written step of Llama-style decoders: forward and backward over fixed buffers."""
