"""Policies, free of any framework: which mean and variance normalize, how the running ones move."""
