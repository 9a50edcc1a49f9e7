"""Quantising a checkpoint's linears layer by layer, in plain torch; no files of output."""
