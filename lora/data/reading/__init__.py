"""Files to examples: JSONL, JSON, CSV, Parquet and text; formats told apart; validation split."""
