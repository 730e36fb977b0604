"""Models and adapters written for other programs: GGUF for llama.cpp, checks for vLLM."""
