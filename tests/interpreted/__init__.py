"""Numerics of the Triton kernels, run by tests/test_interpreter.py under TRITON_INTERPRET=1."""
