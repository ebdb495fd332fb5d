"""Layers and functions on whatever hypothesis thinks of, and damaged files: an answer, or a documented error."""
