"""Numbers of all ranks of torch.distributed: what synchronised statistics travel by."""
