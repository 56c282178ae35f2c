"""Texts to decode, and measurements of the quality of decoding."""
