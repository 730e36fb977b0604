"""Cases, models and our own step of `gpu_step.py`: training steps on one GPU."""
