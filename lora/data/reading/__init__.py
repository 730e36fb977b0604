"""Files to examples: JSONL, JSON, CSV, Parquet and text; format detection; validation split."""
