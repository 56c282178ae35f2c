"""What proposes. One drafter a file; `examples()` gives configured instances to tests and benchmarks."""
