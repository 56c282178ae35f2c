"""Hugging Face causal LMs: load and wrap them, and check that they can be decoded exactly."""
