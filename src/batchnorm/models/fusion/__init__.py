"""The parts of `fuse`: which activations follow a norm, and how both become one layer."""
