"""A model in use: text generation, evaluation on examples, sampled answers during training."""
