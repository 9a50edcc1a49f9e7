"""Tensor functions of the engine: tensors in, tensors out, nothing about requests or models."""
