"""Examples to batches of token ids: encoding, loss masks, packing, padding, order."""
