"""How much memory a run will take, by part, and which activation-checkpointing mode fits."""
