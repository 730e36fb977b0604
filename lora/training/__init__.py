"""The training loop and the plain step: optimizer, losses, checkpoints, diagnosis."""
