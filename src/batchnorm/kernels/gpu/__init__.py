"""The engine for GPUs, in Triton."""
