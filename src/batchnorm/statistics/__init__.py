"""Which mean and variance to use, and how the running ones move: per-channel mathematics, no framework."""
