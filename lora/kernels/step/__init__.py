"""In-place operations of the hand-written GPU step, each in plain PyTorch and in Triton."""
