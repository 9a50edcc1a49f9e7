"""Faults at random under a load that verifies every token: `make chaos`, and shorter as a test."""
