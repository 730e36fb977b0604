"""Inference: text generation, evaluation on examples, samples during training."""
