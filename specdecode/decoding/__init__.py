"""The decoding loop, and what is built on it."""
