"""Files that start a run on several machines: a torchrun script, a Slurm job, a SkyPilot task."""
