"""`calibrate` with masks, with every policy, and for one domain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from tests.torch.test_masks import Encoder, sequences
from tests.torch.twins import assert_identical, scramble, state

POLICIES = {
    "batch": batchnorm.Batch(),
    "ghost": batchnorm.Ghost(2, sequential=True),
    "synced": batchnorm.Synced(),
    "renorm": batchnorm.Renorm(r_steps=(0, 0), d_steps=(0, 0)),
    "adapted": batchnorm.Adapted(3),
}
METHODS: dict[str, dict[str, Any]] = {
    "batch": {},
    "layerwise": {"method": "layerwise"},
    "spilled": {"method": "layerwise", "spill": 1 << 24},
}
LENGTHS = [[6, 2, 5], [3, 6, 6], [1, 2, 2]]


def model_of(**options: Any) -> Encoder:
    torch.manual_seed(0)
    model = Encoder(**options)
    with torch.no_grad():  # a maximum is taken over the sequence: zeros of the padding must not win
        model.body[3].bias.fill_(99.0)
    return model


def masked(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, mask = batch
    with batchnorm.mask(model, mask):
        model(x)


def batches() -> list[tuple[Tensor, Tensor]]:
    return [sequences(lengths, seed=seed) for seed, lengths in enumerate(LENGTHS)]


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_row_1_and_row_2_padded_data_gives_the_statistics_of_the_unpadded(options: dict[str, Any]) -> None:
    """Rows 1 and 2: sample by sample without any padding, and in padded batches with a mask, layerwise.

    In one pass each norm normalizes by its batch, which for the first of them is no matter.
    """
    padded, plain = model_of(), model_of()
    samples = [
        x[i : i + 1, :, :n] for (x, _), row in zip(batches(), LENGTHS, strict=True) for i, n in enumerate(row)
    ]
    report = batchnorm.calibrate(padded, batches(), forward=masked, **options)
    assert [row.values for row in report.layers] == [33, 33, 9]
    wanted = [module for module in plain.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    by_hand(plain, samples, wanted if options else wanted[:1])
    names = [name for name, module in plain.named_modules() if module in (wanted if options else wanted[:1])]
    for name in names:
        for statistic in ("running_mean", "running_var"):
            found = getattr(padded.get_submodule(name), statistic)
            expected = getattr(plain.get_submodule(name), statistic)
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5, msg=f"{name}.{statistic}")


def by_hand(model: nn.Module, samples: list[Tensor], norms: list[nn.Module]) -> None:
    """Set the statistics of one norm after the other by what it receives of all samples, in evaluation."""
    model.eval()
    for norm in norms:
        received: list[Tensor] = []
        handle = norm.register_forward_pre_hook(lambda _, args, to=received: to.append(args[0]))
        with torch.no_grad():
            for x in samples:
                model(x)
        handle.remove()
        values = torch.cat([x.transpose(0, 1).flatten(1) for x in received], 1).double()
        norm.running_mean.copy_(values.mean(1))
        norm.running_var.copy_(values.var(1))


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_a_mask_around_it_holds_for_every_batch(options: dict[str, Any]) -> None:
    model, other = model_of(), model_of()
    data = [sequences([6, 2, 5], seed=seed) for seed in range(3)]
    with batchnorm.mask(model, data[0][1]):
        batchnorm.calibrate(model, [x for x, _ in data], **options)
    batchnorm.calibrate(other, data, forward=masked, **options)
    assert_identical(state(model), state(other))


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_with_every_policy_it_is_as_with_batch(policy: Any, options: dict[str, Any]) -> None:
    """A policy is how a layer trains: the statistics of the whole data are no matter of it."""
    found, expected = model_of(statistics=policy), model_of()
    data = [torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(k)) + k for k in range(3)]
    before = found.head.num_batches_tracked.clone()
    batchnorm.calibrate(found, data, **options)
    batchnorm.calibrate(expected, data, **options)
    assert_identical(state(found), state(expected))
    assert torch.equal(found.head.num_batches_tracked, before)


def test_frozen_layers_are_left() -> None:
    model = model_of()
    batchnorm.freeze(model.body)
    before = state(model.body)
    report = batchnorm.calibrate(model, [torch.randn(6, 3, 5)])
    assert_identical(state(model.body), before)
    assert report.frozen == ("body.1", "body.3")


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_row_35_one_domain_is_calibrated(options: dict[str, Any]) -> None:
    """Row 35: that of the block; the others stay as they are."""
    model, plain = model_of(domains=3), model_of()
    before = state(model)
    data = [torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(k)) + k for k in range(3)]
    with batchnorm.domain(model, 2):
        batchnorm.calibrate(model, data, **options)
    batchnorm.calibrate(plain, data, **options)
    expected = state(plain)
    for name, tensor in state(model).items():
        is_moved = name.endswith(("running_mean_2", "running_var_2"))
        assert torch.equal(tensor, expected[name.removesuffix("_2")] if is_moved else before[name]), name


def subclass_batches() -> Iterator[tuple[Tensor, Tensor]]:
    yield from batches()


def test_norms_whose_class_is_not_known_are_heard_by_their_mask_too() -> None:
    class Mine(batchnorm.BatchNorm1d):
        pass

    model, plain = nn.Sequential(scramble(Mine(3))), nn.Sequential(scramble(batchnorm.BatchNorm1d(3)))
    report = batchnorm.calibrate(model, list(subclass_batches()), forward=masked)
    batchnorm.calibrate(plain, batches(), forward=masked)
    assert report.layers[0].values == 33
    torch.testing.assert_close(model[0].running_var, plain[0].running_var)


CALLS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "mask": lambda norm, x, mask: norm(x, mask=mask),
    "lengths": lambda norm, x, mask: norm(input=x, lengths=mask.sum(1)),
    "in order": lambda norm, x, mask: norm(x, None, mask),
}


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_mask_that_a_norm_is_called_with_is_heeded(call: Any, options: dict[str, Any]) -> None:
    norm = scramble(batchnorm.BatchNorm1d(3))
    other = copy.deepcopy(norm)
    batchnorm.calibrate(norm, batches(), forward=lambda norm, batch: call(norm, *batch), **options)
    batchnorm.calibrate(other, batches(), forward=masked)
    torch.testing.assert_close(state(norm), state(other))
