"""Counts the norms that `fold` absorbs over the zoo, beside `torch.fx.experimental.optimization.fuse`."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

import batchnorm
from batchnorm.models.norms.find import find_norms
from batchnorm.models.verify import call

from . import zoo, zoo_nasty
from .fold_possible import possible
from .fx_fuse import fx_fuse
from .progress import progress
from .tables import Row, Rows

WRONG = 1e-9  # of the largest value of an output, in float64: tens of layers round at 1e-16
QUICK = ("MobileNetV2", "LeViT", "RT-DETR, frozen backbone", *zoo_nasty.NASTY)


def measure(quick: bool = False) -> Rows:
    """Return a row per network of the zoo."""
    transformers.logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the networks' own
        return [row(name) for name in progress(QUICK if quick else tuple(zoo.ZOO), "folding")]


def row(name: str) -> Row:
    """Return the fate of a network's norms that run, the error of its outputs, and fx's outcome."""
    model, example = zoo.made(name)
    running, functional = _running(model, example)
    allowed = possible(model, example)
    report = {entry.name: entry for entry in batchnorm.inspect(model, example).rows}
    folded = batchnorm.fold(model, example)
    left = {found.name for found in find_norms(folded)}
    return {
        "network": name,
        "running": len(running) + functional,
        "absorbed": len(running - left),
        "allowed": len(allowed),
        "allowed_absorbed": len(allowed - left),
        "stay": dict(Counter(report[norm].stays for norm in sorted(running & left)))
        | ({"a function, no module": functional} if functional else {}),
        "off_float32": _off(model, folded, example),
        "off_float64": _off_wide(model, example),
        "fx": _fx(model, example, len(running)),
    }


def _off_wide(model: nn.Module, example: Any) -> float | None:
    """Return how far a copy of the model in float64 is off; None where the model does not run in that."""
    wide = copy.deepcopy(model).double()
    given = pytree.tree_map(
        lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, example
    )
    try:
        _outputs(wide, given)
    except RuntimeError:
        return None
    return _off(wide, batchnorm.fold(wide, given), given)


def _running(model: nn.Module, example: Any) -> tuple[set[str], int]:
    """Return the names of the norms that an example reaches, and the number of functional ones."""
    running: set[str] = set()
    names = {found.module: found.name for found in find_norms(model)}
    inside = []

    def begin(norm: nn.Module, _args: Any) -> None:
        running.add(names[norm])
        inside.append(norm)

    def end(_norm: nn.Module, _args: Any, _y: Any) -> None:
        inside.pop()

    class Functions(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = kwargs or {}
            training = args[5] if len(args) > 5 else given.get("training", False)
            self.count += func is F.batch_norm and not inside and not training
            return func(*args, **given)

    handles = [norm.register_forward_pre_hook(begin) for norm in names]
    handles += [norm.register_forward_hook(end) for norm in names]
    with torch.no_grad(), Functions() as functions:
        call(model, example)
    for handle in handles:
        handle.remove()
    return running, int(functions.count)


def _off(model: nn.Module, other: nn.Module, example: Any) -> float:
    """Return the largest difference of an output, over its largest value."""
    with torch.no_grad():
        pairs = [
            (wanted, given)
            for wanted, given in zip(*(_outputs(one, example) for one in (model, other)), strict=True)
        ]
    return max(float((given - wanted).abs().max() / wanted.abs().max()) for wanted, given in pairs)


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        leaves = pytree.tree_leaves(call(model, example))
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.numel() and x.any()]


def _fx(model: nn.Module, example: Any, running: int) -> Row:
    """Return how many norms fx's fuse absorbs and how far it is off, or why it does not run."""
    try:
        fused = fx_fuse(model)
        left = len(find_norms(fused))
        return {"absorbed": max(running - left, 0), "off": _off(model, fused, example)}
    except Exception as error:  # untraceable, mostly
        lines = str(error).strip().splitlines()
        return {"absorbed": 0, "error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
