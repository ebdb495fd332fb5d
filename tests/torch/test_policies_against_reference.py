"""Every policy on every case of the grid, against the reference: masks, groups, layouts, dtypes, activations.

By both engines, and as plain operations within a transform of `torch.func`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import batchnorm
from batchnorm import kernels, reference
from batchnorm.statistics.policy import Policy
from tests.support.cases import AROUND_A_KINK, CASES, KINKS, Case, Inputs, covering_cases
from tests.support.compare import as_array, assert_close
from tests.support.oracle import Expected, Options, Past, Values, expected_of

BATCHES = 3  # that the layer has seen
MOMENTUM = 0.3
KINDS = {2: "BatchNorm1d", 3: "BatchNorm1d", 4: "BatchNorm2d", 5: "BatchNorm3d"}


class Found(NamedTuple):
    """The results of a layer's call."""

    y: Tensor
    dx: Tensor
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor


def ghost(case: Case) -> int:
    """Return a size that leaves no ghost batch of one value: the case's own, or about half of the batch."""
    return case.group_size or max(2, -(-case.shape[0] // 2))


# name -> (policy of a case, training). The layer has seen three batches.
POLICIES: dict[str, tuple[Callable[[Case], Policy], bool]] = {
    "batch": (lambda _: batchnorm.Batch(), True),
    "evaluation": (lambda _: batchnorm.Batch(), False),
    "ghost": (lambda case: batchnorm.Ghost(ghost(case)), True),
    "ghost-sequential": (lambda case: batchnorm.Ghost(ghost(case), sequential=True), True),
    "ghost-evaluation": (lambda case: batchnorm.Ghost(ghost(case)), False),
    "renorm-closed": (lambda _: batchnorm.Renorm(), True),
    "renorm-half-open": (lambda _: batchnorm.Renorm(2.0, 1.0, (1, 5), (2, 4)), True),
    "renorm-clipped": (lambda _: batchnorm.Renorm(1.25, 0.5, (0, 0), (0, 0)), True),
    "renorm-open": (lambda _: batchnorm.Renorm(1e3, 1e3, (0, 0), (0, 0)), True),
    "renorm-evaluation": (lambda _: batchnorm.Renorm(1e3, 1e3, (0, 0), (0, 0)), False),
    "running": (lambda _: batchnorm.Running(), True),
    "adapted": (lambda _: batchnorm.Adapted(5.0), False),
    "adapted-training": (lambda _: batchnorm.Adapted(5.0), True),
    "synced-renorm-alone": (
        lambda _: batchnorm.Synced(over=batchnorm.Renorm(1.25, 0.5, (0, 0), (0, 0))),
        True,
    ),
}


def layer_for(case: Case, inputs: Inputs, policy: Policy, training: bool) -> torch.nn.Module:
    """Return the layer, with running statistics near, above and below the batch's, channel by channel."""
    layer = getattr(batchnorm, KINDS[len(case.shape)])(
        case.shape[1],
        momentum=MOMENTUM,
        affine=case.affine,
        dtype=case.parameter_dtype or case.dtype,
        activation=case.activation,
        statistics=policy,
    ).train(training)
    found = reference.moments(as_array(inputs.x), None if inputs.mask is None else inputs.mask.cpu().numpy())
    if not found.count.any():
        found = found._replace(m2=found.m2 + 1.0)
    channels = torch.arange(case.shape[1])
    wide, far = (
        torch.tensor([1.2, 4.0, 0.3])[channels % 3],
        torch.tensor([0.2, 1.5, -1.5, -0.1])[channels % 4],
    )
    mean, var = torch.from_numpy(found.mean[0]), torch.from_numpy(found.var[0] + (found.count == 0)[0])
    with torch.no_grad():
        if case.affine:
            layer.weight.copy_(inputs.weight)
            layer.bias.copy_(inputs.bias)
        layer.running_var.copy_(wide * var)
        layer.running_mean.copy_(mean + far * layer.running_var.sqrt())
        layer.num_batches_tracked.fill_(BATCHES)
    return layer


def prepared(case: Case, name: str) -> tuple[torch.nn.Module, Inputs, Expected]:
    """Return a layer, its inputs, with dy = 0 next to kinks of this policy's z, and what is expected."""
    make, training = POLICIES[name]
    inputs = dataclasses.replace(case, activation=None).make()
    layer = layer_for(case, inputs, make(case), training)
    past = Past(reference.Running(as_array(layer.running_mean), as_array(layer.running_var)), BATCHES)
    options = Options(layer.statistics, training, momentum=MOMENTUM, activation=case.activation)

    def expected(inputs: Inputs) -> Expected:
        arrays = [None if t is None else as_array(t) for t in inputs[:-1]]
        mask = None if inputs.mask is None else inputs.mask.numpy()
        return expected_of(Values(*arrays, mask), past, options)

    found = expected(inputs)
    for kink in KINKS.get(case.activation or "", ()):
        near = torch.from_numpy(np.abs(found.z - kink) < AROUND_A_KINK)
        inputs = inputs._replace(dy=inputs.dy.masked_fill(near, 0.0))
    return layer, inputs, expected(inputs)


def called(layer: torch.nn.Module, inputs: Inputs) -> Found:
    """Return what an eager call gives."""
    x, _, _, residual, dy, mask = inputs
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    y = layer(x, residual, mask)
    y.backward(dy)
    gradients = [None if p is None else p.grad for p in (layer.weight, layer.bias, residual)]
    return Found(y.detach(), x.grad, *gradients, *dict(layer.named_buffers()).values())


def transformed(layer: torch.nn.Module, inputs: Inputs) -> Found:
    """Return what a call within `torch.func.vjp` gives: the path of plain operations."""
    leaves = {f"layer.{name}": parameter.detach() for name, parameter in layer.named_parameters()}
    leaves |= {"x": inputs.x} | ({} if inputs.residual is None else {"residual": inputs.residual})

    def call(leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        parameters = {n.removeprefix("layer."): t for n, t in leaves.items() if n.startswith("layer.")}
        tensors = (leaves["x"], leaves.get("residual"), inputs.mask)
        return torch.func.functional_call(layer, (parameters, buffers), tensors), buffers

    y, vjp, buffers = torch.func.vjp(call, leaves, has_aux=True)
    (found,) = vjp(inputs.dy)
    gradients = [found.get(name) for name in ("layer.weight", "layer.bias", "residual")]
    return Found(y, found["x"], *gradients, *buffers.values())


def assert_as_expected(found: Found, expected: Expected, case: Case, path: str) -> None:
    """Raise unless every value is within the tolerance of its dtype."""
    narrow, parameters = case.dtype, case.parameter_dtype or case.dtype
    assert found.y.dtype is narrow, path
    assert_close(found.y, expected.y, dtype=narrow, what=f"{path}: y")
    assert_close(found.dx, expected.dx, dtype=narrow, scale=expected.std, what=f"{path}: dx")
    if case.residual:
        assert_close(found.dresidual, expected.dresidual, dtype=narrow, what=f"{path}: dresidual")
    if case.affine:
        assert_close(found.dweight, expected.dweight, dtype=parameters, what=f"{path}: dweight")
        assert_close(found.dbias, expected.dbias, dtype=parameters, what=f"{path}: dbias")
    wide = torch.promote_types(case.dtype, torch.float32)
    assert found.running_mean.dtype is wide, path
    assert_close(found.running_mean, expected.running.mean, dtype=wide, what=f"{path}: running_mean")
    assert_close(found.running_var, expected.running.var, dtype=wide, what=f"{path}: running_var")
    assert found.batches == BATCHES + expected.batches, path


# These compute what another one computes, by the documentation: a covering subset of the cases will do.
LIKE_ANOTHER = {
    "ghost-evaluation",
    "renorm-evaluation",
    "renorm-closed",
    "adapted-training",
    "synced-renorm-alone",
}
FEW = covering_cases(CASES)


@pytest.mark.one_in(5)
@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for name in POLICIES for case in CASES if name not in LIKE_ANOTHER or case in FEW],
    ids=str,
)
def test_every_policy_on_every_case(case: Case, name: str) -> None:
    """Rows 2, 17, 21 and 27: masked, far from zero, in ghost batches, in every layout."""
    start, inputs, expected = prepared(case, name)
    for path in ("cpu", "eager", "plain"):
        layer = copy.deepcopy(start)
        with contextlib.nullcontext() if path == "plain" else kernels.use(path):
            found = transformed(layer, inputs) if path == "plain" else called(layer, inputs)
        assert_as_expected(found, expected, case, path)
        if inputs.mask is not None:
            left_out = ~inputs.mask.unsqueeze(1).expand(case.shape)
            for values in (found.y, found.dx, found.dresidual):
                assert values is None or not values[left_out].any(), path
