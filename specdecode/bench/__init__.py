"""Speed as a regression test: arms, which are ways to decode, measured against a baseline and gated."""
