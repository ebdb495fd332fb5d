"""Speed: the engines that compute batch normalization, and the choice between them."""

from .choose import explain, use

__all__ = ["explain", "use"]
