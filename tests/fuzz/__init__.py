"""Layers on all that hypothesis thinks of, and damaged files: an answer, or a documented error."""
