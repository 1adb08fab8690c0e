"""Tiny models and peft references, for tests and benchmarks; also for users' own tests."""
