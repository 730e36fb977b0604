"""Run directories: typed records, locking, progress, interrupts, subprocesses."""
