"""Tests state invariants and compare with oracles nobody here wrote."""
