"""What `gpu_families.py` measures, and how."""
