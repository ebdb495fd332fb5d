"""Policies, per channel and without a framework: which mean and variance normalize, how the running ones move."""
