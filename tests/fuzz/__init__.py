"""Layers and functions on whatever hypothesis thinks of: the reference's answer, or a documented error."""
