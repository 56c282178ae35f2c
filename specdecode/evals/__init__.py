"""Text to decode, and what decoding costs in quality."""
