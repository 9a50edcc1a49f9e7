"""Quantising a dense checkpoint: methods, calibration, the resumable job."""
