"""GPU training steps: which one trains a model, the captured step and the hand-written one."""
