"""Hugging Face causal LMs: loading, wrapping, and the check that they can be decoded exactly."""
