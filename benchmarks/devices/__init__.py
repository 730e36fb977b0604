"""Cases, processes and peers of `gpu_many.py`: training steps on several GPUs."""
