"""The decoding loop, and the functions that are built on it."""
