"""Drafters, which propose tokens. Each has its own file with `examples()`: instances for tests and benchmarks."""
