"""Checkpoint files: tensors, sizes, settings and hashes, and writing them whole. Never imports torch."""
