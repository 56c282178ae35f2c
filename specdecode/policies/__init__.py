"""What stays in the cache. One policy a file; `examples()` gives configured instances to tests and benchmarks."""
