"""The layers and functions for PyTorch."""
