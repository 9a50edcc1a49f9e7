"""Routes, one file per protocol, and how bodies come in and streams go out."""
