"""The container formats of checkpoints: one reader for each, and what they share. Never imports torch."""
