"""Contexts of a call: a mask, a domain, accumulated micro-batches, a recomputed forward."""
