"""Independent quantisation tools from PyPI, run on our checkpoints: oracles and peers.

Each module drives one of them and is imported in a Python environment that has it
(docs/quantization.md says how to make one); none is a dependency of the project.
"""
