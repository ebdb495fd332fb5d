"""The engine for GPUs, in Triton, which is loaded here, before any of the folder's modules."""

from .triton_import import load_triton

load_triton()
