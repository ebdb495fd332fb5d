"""The engine for CPUs, in Numba."""
