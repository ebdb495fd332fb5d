"""Layers and whole training steps on one device: `python -m benchmarks.run --device cuda`."""
