"""Hugging Face causal LMs: load them, wrap them, check that they can be decoded exactly."""
