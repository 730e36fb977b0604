"""Models from disk: Hugging Face folders and GGUF files, weights and tokenizers, both ways."""
