"""Speed: the engines that compute batch normalization, and the choice between them."""

from batchnorm.errors import naming_the_extra

with naming_the_extra("batchnorm.kernels"):
    from .choose import cache_folder, explain, use

__all__ = ["cache_folder", "explain", "use"]
