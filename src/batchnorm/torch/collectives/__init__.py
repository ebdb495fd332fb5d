"""Collectives between the ranks of torch.distributed, which carry synchronized statistics."""
