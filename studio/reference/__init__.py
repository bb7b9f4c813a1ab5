"""Plain textbook loops that tests and benchmarks compare with."""
