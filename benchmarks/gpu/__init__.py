"""Measurements and checks of the kernels and of the engine on one NVIDIA GPU."""
