"""Experiments: what batch normalization buys a network on a data set."""
