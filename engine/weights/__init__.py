"""Checkpoint files in, tensors of one rank out."""
