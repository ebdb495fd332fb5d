"""torch's own recorded samples of batch normalization: the modules' (module_db) and the function's (op_db).

Importing torch's test internals freezes `torch.backends`, sets an environment variable and adds warning
filters; all of it is put back, so that the other tests of the process see the torch that users see.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

KINDS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d")


@contextlib.contextmanager
def _without_a_trace() -> Iterator[None]:
    environment = dict(os.environ)
    unfrozen = torch.backends.__allow_nonbracketed_mutation_flag
    with warnings.catch_warnings():
        yield
    torch.backends.__allow_nonbracketed_mutation_flag = unfrozen
    for name in set(os.environ) - set(environment):
        del os.environ[name]
    os.environ.update(environment)


_environment = dict(os.environ)
with _without_a_trace():
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
LEFT_IN_ENVIRONMENT = set(os.environ.items()) - set(_environment.items())

_MODULES = {
    info.module_cls.__name__: info for info in module_db if info.module_cls.__module__.startswith("torch")
}
_FUNCTION = next(
    info for info in op_db if info.name == "nn.functional.batch_norm" and not info.variant_test_name
)


def module_samples(kind: str, dtype: torch.dtype, training: bool) -> list[Any]:
    """Return the recorded inputs of `torch.nn.<kind>`: constructor arguments and one forward input each."""
    info = _MODULES[kind]
    samples = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=False, training=training)
    return [sample for sample in samples if _is_constructible(kind, sample)]


def module_errors(kind: str) -> list[Any]:
    """Return the recorded inputs that `torch.nn.<kind>` refuses, with the type and text of the error."""
    info = _MODULES[kind]
    return list(
        info.module_error_inputs_func(
            info, device="cpu", dtype=torch.float32, requires_grad=False, training=True
        )
    )


def function_samples(dtype: torch.dtype, requires_grad: bool = False) -> list[Any]:
    """Return the recorded inputs of `torch.nn.functional.batch_norm`."""
    return list(_FUNCTION.sample_inputs("cpu", dtype, requires_grad=requires_grad))


def _is_constructible(kind: str, sample: Any) -> bool:
    """Whether the installed stock class takes the arguments (`bias=` came with a later release)."""
    try:
        getattr(nn, kind)(*sample.constructor_input.args, **sample.constructor_input.kwargs)
    except TypeError:
        return False
    return True


# (class, position among its samples, name): known at collection, made anew for each test.
MODULE_CASES = [
    (kind, index, f"{kind}-{sample.desc or 'plain'}")
    for kind in KINDS
    for index, sample in enumerate(module_samples(kind, torch.float32, True))
]
FUNCTION_CASES = range(len(function_samples(torch.float32)))
