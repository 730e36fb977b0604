"""K adapters on one frozen base in one pass: layers, loss, the plain training step."""
