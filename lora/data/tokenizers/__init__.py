"""Text to token ids: subword tokenizers, characters, character offsets of tokens."""
