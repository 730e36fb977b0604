"""Export for other programs: models as GGUF for llama.cpp, adapters checked for vLLM."""
