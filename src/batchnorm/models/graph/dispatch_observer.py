"""What those ask who watch a forward operator by operator: which tensors a call has, which it writes to."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from batchnorm.torch import dispatch, functional

# Functions whose kernels are no operators that a watcher would see.
OURS = frozenset({functional.batch_norm, dispatch.batch_norm})

# Ways out of torch: they read values, and no operator shows it.
LEAVING = frozenset({Tensor.numpy, Tensor.tolist, Tensor.__array__, Tensor.__dlpack__, Tensor.data_ptr})


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in arguments or results, of any nesting."""
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Return the tensors that an operator writes to."""
    found = []
    schema = getattr(func, "_schema", None)  # operators of higher order have none, and write into nothing
    for place, argument in enumerate(schema.arguments if schema else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(argument.name)
            found += tensors_in(given)
    return found
