"""The run directory on disk: its files, lock, progress, interrupts, subprocesses."""
