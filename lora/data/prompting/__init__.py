"""What a model is asked: how rows become prompts in training, and texts do in use."""
