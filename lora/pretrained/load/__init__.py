"""A model's folder loaded as a LanguageModel: by a native decoder, or by transformers' own code."""
