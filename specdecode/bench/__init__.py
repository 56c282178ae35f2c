"""Speed as a regression test: ways to decode, measured in pairs."""
