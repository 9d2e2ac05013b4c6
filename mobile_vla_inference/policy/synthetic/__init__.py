"""Synthetic checkpoints: random weights and processors in the published layout, for tests and benchmarks."""
