"""`batchnorm.mask`: padding is in no statistic of any norm of a model, however deep."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import reference
from batchnorm.errors import InputShapeError, InputTypeError, OptionError
from batchnorm.torch.contexts.masks import reduced
from tests.support.compare import as_array, assert_close
from tests.torch.twins import assert_identical, scramble, state, step

POLICIES = {
    "batch": batchnorm.Batch(),
    "ghost": batchnorm.Ghost(2),
    "renorm": batchnorm.Renorm(1.5, 0.5, r_steps=(0, 0), d_steps=(0, 0)),
    "running": batchnorm.Running(),
    "adapted": batchnorm.Adapted(3),
}


def sequences(lengths: list[int], channels: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return sequences padded with what must not count, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), channels, max(lengths), generator=generator) + 2
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    return torch.where(mask.unsqueeze(1), x, 1e30), mask


class Encoder(nn.Module):
    """Pointwise layers, so that padding reaches a value by statistics only; pooled to `[N, C]` in the end."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(3, 4, 1),
            scramble(batchnorm.BatchNorm1d(4, activation="relu", **options)),
            nn.Conv1d(4, 5, 1),
            scramble(batchnorm.BatchNorm1d(5, **options)),
        )
        self.head = scramble(batchnorm.BatchNorm1d(5, **options))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).amax(2))


def by_hand(mask: np.ndarray, sizes: tuple[int, ...]) -> np.ndarray:
    """Return a reduced mask, position by position: those that overlap, or that in which it begins."""
    found = np.zeros((len(mask), *sizes), dtype=bool)
    for place in np.ndindex(*sizes):
        part = mask
        for axis, (i, size) in enumerate(zip(place, sizes, strict=True), start=1):
            length = mask.shape[axis]
            first = i * length // size
            last = first + 1 if size > length else -(-(i + 1) * length // size)
            part = part.take(range(first, last), axis=axis)
        found[(slice(None), *place)] = part.reshape(len(mask), -1).any(1)
    return found


@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((7,), (7,)),
        ((7,), (4,)),
        ((8,), (2,)),
        ((3,), (8,)),
        ((6,), (1,)),
        ((9, 5), (4, 3)),
        ((9, 5), (9, 11)),
        ((4, 5, 6), (2, 7, 3)),
    ],
    ids=str,
)
def test_a_position_counts_if_any_that_falls_in_it_does(
    shape: tuple[int, ...], sizes: tuple[int, ...]
) -> None:
    torch.manual_seed(1)
    mask = torch.rand(5, *shape) > 0.8
    found = reduced(mask, (5, *sizes))
    assert found.dtype == torch.bool
    np.testing.assert_array_equal(found.numpy(), by_hand(mask.numpy(), sizes))
    if all(size <= length for size, length in zip(sizes, shape, strict=True)) and len(shape) < 4:
        pool = getattr(nn.functional, f"adaptive_max_pool{len(shape)}d")
        assert torch.equal(found, pool(mask.float(), sizes) > 0)


def test_no_axes_and_empty_ones() -> None:
    mask = torch.tensor([[True, False], [False, False]])
    assert reduced(mask, (2,)).tolist() == [True, False]
    assert reduced(torch.tensor([True, False]), (2, 2, 1)).tolist() == [[[True], [True]], [[False], [False]]]
    assert reduced(torch.ones(2, 0, dtype=torch.bool), (2, 3)).tolist() == [[False] * 3] * 2
    assert reduced(mask, (2, 0)).shape == (2, 0)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_row_2_a_padded_model_is_the_unpadded_one(policy: Any, training: bool) -> None:
    """Row 2: outputs, gradients and running statistics are those of sequences of one length, cut to it."""
    x, mask = sequences([6, 6, 6, 6, 6, 6], seed=1)
    padded = torch.cat([x, torch.full((6, 3, 4), 1e30)], 2)
    longer = torch.cat([mask, torch.zeros(6, 4, dtype=torch.bool)], 1)
    torch.manual_seed(0)
    plain = Encoder(statistics=policy).double().train(training)
    model = copy.deepcopy(plain)
    dy = torch.randn(6, 5, dtype=torch.float64)
    with torch.no_grad():  # a maximum is taken over the sequence: zeros of the padding must not win
        for one in (plain, model):
            one.body[3].bias.fill_(99.0)
    expected = step(plain, x.double(), dy)
    with batchnorm.mask(model, longer):
        found = step(model, padded.double(), dy)
    assert torch.equal(found["dx"][..., 6:], torch.zeros(6, 3, 4, dtype=torch.float64))
    found["dx"] = found["dx"][..., :6]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_ragged_layer_is_the_reference_on_its_mask(policy: Any) -> None:
    """The context hands over what `mask=` does, which is compared with the reference elsewhere; once here."""
    x, mask = sequences([7, 2, 5, 1])
    layer, other = (scramble(batchnorm.BatchNorm1d(3, statistics=policy)) for _ in range(2))
    other.load_state_dict(layer.state_dict())
    dy = torch.randn_like(x)
    with batchnorm.mask(layer, mask):
        found = step(layer, x, dy)

    leaf = x.clone().requires_grad_()
    y = other(leaf, mask=mask)
    y.backward(dy)
    assert torch.equal(found["y"], y.detach())
    assert torch.equal(found["dx"], leaf.grad)
    assert torch.equal(found["dweight"], other.weight.grad)
    assert_identical(state(layer), state(other))
    if policy == batchnorm.Batch():
        weight, bias = (as_array(t) for t in (layer.weight, layer.bias))
        wanted = reference.forward(as_array(x), weight, bias, mask=mask.numpy())
        gradients = reference.backward(as_array(x), as_array(dy), weight, bias, mask=mask.numpy())
        assert_close(found["y"], wanted.y, dtype=torch.float32, what="y")
        assert_close(found["dx"], gradients.dx, dtype=torch.float32, what="dx")


def test_it_holds_within_the_block_only_and_the_inner_one_wins() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    x, mask = sequences([4, 2, 3])
    inner = mask & (torch.arange(4) < 2)
    plain = model(x)

    def zeros() -> Tensor:
        return (model.body(x) == 0).all(1)

    with batchnorm.mask(model, mask):
        assert torch.equal(zeros(), ~mask)
        with batchnorm.mask(model.body, inner):
            assert torch.equal(zeros(), ~inner)
            with batchnorm.mask(model, None):
                assert torch.equal(model(x), plain)
            assert torch.equal(zeros(), ~inner)
        assert torch.equal(zeros(), ~mask)
        y = model.body[1](torch.ones(3, 4, 4), mask=inner)  # its own comes first
        assert torch.equal((y != 0).any(1), inner)
    with pytest.raises(ZeroDivisionError), batchnorm.mask(model, mask):
        raise ZeroDivisionError
    assert torch.equal(model(x), plain)
    assert all("_scope" not in vars(module) for module in model.modules())


def test_a_mask_is_reduced_once_for_all_layers_of_a_grid_and_anew_when_written_to() -> None:
    norms = nn.Sequential(*(batchnorm.BatchNorm1d(3) for _ in range(3)))
    x, mask = sequences([4, 2, 3])
    with batchnorm.mask(norms, mask):
        norms(x[..., ::2])
        masked = norms[0]._scope.masked
        assert masked is norms[2]._scope.masked
        first = masked.of(x[..., ::2])
        assert masked.of(x[:, :1, ::2]) is first
        mask[:] = False
        assert not masked.of(x[..., ::2]).any()


def test_a_mask_that_was_made_in_inference_mode_is_as_any_other() -> None:
    """It has no version by which one could tell that it was written to."""
    model = Encoder().eval()
    x, mask = sequences([4, 2, 3])
    with torch.inference_mode():
        made = mask.clone()
    found = []
    for one in (mask, made):
        with torch.no_grad(), batchnorm.mask(model, one):
            found.append(model(x))
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused_by_name_and_changes_nothing() -> None:
    model = Encoder()
    x, mask = sequences([4, 2, 3])
    before = state(model)
    with (
        pytest.raises(InputShapeError, match=r"^body\.1 \(BatchNorm1d\): .*for 2 samples .* input has 3"),
        batchnorm.mask(model, mask[:2]),
    ):
        model(x)
    with (
        pytest.raises(
            InputShapeError, match=r"^body\.1 \(BatchNorm1d\): .*has 2 axes .* this layer's input 1"
        ),
        batchnorm.mask(model, mask.unsqueeze(2)),
    ):
        model(x)
    assert_identical(state(model), before)
    for wrong in (mask.float(), "mask", torch.tensor(True)):
        with pytest.raises(InputTypeError, match="bool tensor"), batchnorm.mask(model, wrong):
            pass
    with pytest.raises(OptionError, match="Linear has no batch normalization to mask"):
        batchnorm.mask(nn.Linear(2, 2), mask).__enter__()
    for norm in (nn.BatchNorm1d(3), nn.SyncBatchNorm(3), type("Mine", (nn.BatchNorm1d,), {})(3)):
        stock = nn.Sequential(batchnorm.BatchNorm1d(3), norm)
        with (
            pytest.raises(OptionError, match=r"^1 \(.*: .*batchnorm.convert\(model\) first"),
            batchnorm.mask(stock, mask),
        ):
            pass
        assert "_scope" not in vars(stock[0])


def test_an_all_masked_batch_is_an_empty_one() -> None:
    model = Encoder()
    x, mask = sequences([4, 2, 3])
    before = state(model)
    with batchnorm.mask(model, torch.zeros_like(mask)):
        y = model(x)
    assert torch.equal(y, torch.zeros_like(y))
    for name, tensor in state(model).items():
        assert torch.equal(tensor, before[name] + (1 if "num_batches" in name else 0)), name


def test_copies_and_files_know_no_mask() -> None:
    model = Encoder()
    _, mask = sequences([4, 2, 3])
    with batchnorm.mask(model, mask):
        others = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model.head)]
    for other in others:
        assert all(getattr(module, "_scope", None) is None for module in other.modules())


def test_lean_under_a_mask() -> None:
    torch.manual_seed(0)
    x, mask = sequences([6, 2, 5, 4])
    found = []
    for is_lean in (False, True):
        torch.manual_seed(0)
        model, leaf = Encoder(), x.clone().requires_grad_()
        with batchnorm.mask(model, mask):
            if is_lean:
                with batchnorm.lean():
                    y = model(leaf)
            else:
                y = model(leaf)
        y.backward(torch.ones_like(y).cumsum(0))
        found.append({"y": y.detach(), "dx": leaf.grad} | state(model))
    assert_identical(found[1], found[0])


@pytest.mark.parametrize("policy", ["batch", "ghost", "renorm"])
def test_row_2_compiled_models_heed_it(policy: str) -> None:
    """Row 2: whether it is there, and what it is, is asked at every call, without compiling anew for each."""
    torch.compiler.reset()
    torch.manual_seed(0)
    eager = Encoder(statistics=POLICIES[policy])
    compiled = copy.deepcopy(eager)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    run = torch.compile(compiled, backend=backend, fullgraph=True)
    for seed, lengths in enumerate([[6, 2, 5, 4], [1, 6, 3, 2], [2, 2, 6, 4]]):
        x, mask = sequences(lengths, seed=seed)
        dy = torch.randn(4, 5)
        with batchnorm.mask(compiled, mask), batchnorm.mask(eager, mask):
            found, expected = step(run, x, dy), step(eager, x, dy)
        for (name, ours), theirs in zip(found.items(), expected.values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=4e-6, atol=4e-6, msg=name)
    assert graphs <= 2
    x = torch.randn(4, 3, 6)
    torch.testing.assert_close(run(x), eager(x), rtol=4e-6, atol=4e-6)
    torch.compiler.reset()


def test_lazy_layers_heed_it_from_the_first_call() -> None:
    model = batchnorm.convert(nn.Sequential(nn.LazyBatchNorm1d()))
    x, mask = sequences([4, 2, 3])
    with batchnorm.mask(model, mask):
        y = model(x)
    assert torch.equal((y == 0).all(1), ~mask)
