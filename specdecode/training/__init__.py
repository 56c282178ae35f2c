"""Draft heads from scratch: texts, what the target makes of them, and the training."""
