"""Quantising a checkpoint's linears layer by layer, in plain torch; it writes no checkpoint."""
