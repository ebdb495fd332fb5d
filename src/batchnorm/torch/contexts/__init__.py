"""What surrounds a call: a mask, a domain, micro-batches that move as one, a forward computed again."""
