"""From data files to batches: reading, chat templates, tokenizers, packed sequences."""
