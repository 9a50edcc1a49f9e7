"""How linears are stored: one module per format, each to and from engine/weights/matrix.py."""
