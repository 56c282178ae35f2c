"""Drafters propose. Each has a file; its `examples()` gives configured instances to tests and benchmarks."""
