"""Layers and functions on what hypothesis thinks of, and damaged files: an answer, or a documented error."""
