"""Activation checkpointing: what is computed again is what was computed, and statistics move once."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.errors import RecomputeError
from batchnorm.torch.recomputed import KEPT, Memory
from tests.torch.twins import assert_identical, scramble

RENORM = batchnorm.Renorm(1.5, 0.5, r_steps=(2, 6), d_steps=(2, 6))
POLICIES = {
    "batch": {},
    "average": {"momentum": None},
    "ghost": {"statistics": batchnorm.Ghost(3)},
    "sequential": {"statistics": batchnorm.Ghost(2, sequential=True)},
    "renorm": {"statistics": RENORM},
    "synced-renorm": {"statistics": batchnorm.Synced(over=RENORM)},
    "running": {"statistics": batchnorm.Running()},
    "adapted": {"statistics": batchnorm.Adapted(4)},
    "untracked": {"track_running_stats": False},
    "lenient": {"small_batch": "running"},
    "lenient-ghost": {"small_batch": "running", "statistics": batchnorm.Ghost(5)},
    "skip": {"nonfinite": "skip"},
    "skip-renorm": {"nonfinite": "skip", "statistics": RENORM},
}
Way = Callable[..., Any]
WAYS: dict[str, Way] = {
    "reentrant": lambda f, *a: checkpoint(f, *a, use_reentrant=True),
    "not": lambda f, *a: checkpoint(f, *a, use_reentrant=False),
    "nested-reentrant": lambda f, *a: checkpoint(
        lambda *b: checkpoint(f, *b, use_reentrant=True), *a, use_reentrant=True
    ),
    "nested": lambda f, *a: checkpoint(
        lambda *b: checkpoint(f, *b, use_reentrant=False), *a, use_reentrant=False
    ),
    "mixed": lambda f, *a: checkpoint(
        lambda *b: checkpoint(f, *b, use_reentrant=True), *a, use_reentrant=False
    ),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
each_way = pytest.mark.parametrize("way", [WAYS["reentrant"], WAYS["not"]], ids=["reentrant", "not"])


def plainly(f: Way, *a: Any) -> Any:
    return f(*a)


class Net(nn.Module):
    """Norms that are called once, twice, with a residual, and with a mask of their own."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(3)])
        self.first = scramble(batchnorm.BatchNorm2d(4, **options, activation="silu"))
        self.shared = scramble(batchnorm.BatchNorm2d(4, **options))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.first(self.convs[0](x), None, mask)
        y = self.shared(self.convs[1](y), x, mask)
        return self.shared(self.convs[2](y), None, mask)


def made(options: dict[str, Any], make: Callable[..., nn.Module] = Net) -> nn.Module:
    torch.manual_seed(3)
    return make(**options)


def batches(count: int = 3, samples: int = 7) -> list[Tensor]:
    torch.manual_seed(4)
    return [torch.randn(samples, 4, 5, 4) * (k + 1) + k for k in range(count)]


def trained(
    net: nn.Module, way: Way, inputs: list[Tensor], masks: list[Tensor] | None = None, steps: int = 2
) -> dict[str, Tensor]:
    """Return outputs, gradients and state after steps of several forwards and then their backwards."""
    torch.manual_seed(5)
    found: dict[str, Tensor] = {}
    for step in range(steps):
        leaves = [x.clone().requires_grad_() for x in inputs]
        outputs = [
            way(net, leaf) if masks is None else way(net, leaf, mask)
            for leaf, mask in zip(leaves, masks or leaves, strict=True)
        ]
        found |= differentiated(net, leaves, outputs, f"of step {step}")
    return found


def differentiated(
    net: nn.Module, leaves: list[Tensor], outputs: list[Tensor], what: str = ""
) -> dict[str, Tensor]:
    """Return outputs, gradients and buffers; a backward for each output, as sums depend on their order."""
    found: dict[str, Tensor] = {}
    for k, (leaf, y) in enumerate(zip(leaves, outputs, strict=True)):
        net.zero_grad()
        y.backward(torch.randn_like(y))
        found |= {f"y{k} {what}": y.detach(), f"dx{k} {what}": leaf.grad}
        found |= {f"d{n} {k} {what}": p.grad for n, p in net.named_parameters()}
    return found | {f"{n} {what}": b.clone() for n, b in net.named_buffers()}  # `skipped` too


def assert_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """NaN equals itself here."""
    zeroed = [{n: torch.where(t.isnan(), 1e30, t) for n, t in both.items()} for both in (found, expected)]
    assert_identical(*zeroed)


@every_way
@pytest.mark.parametrize("options", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("with_mask", [False, True], ids=["plain", "masked"])
def test_row_8_checkpointing_changes_no_bit(options: dict[str, Any], with_mask: bool, way: Way) -> None:
    """Row 8: outputs, gradients, statistics, counts and `skipped`, three forwards before a backward."""
    inputs = batches()
    if options.get("nonfinite") == "skip":
        inputs[1][2, 1] = torch.inf
    masks = None
    if with_mask:
        masks = [torch.rand(7, 5, 4) > 0.3 for _ in inputs]
        masks[2][5:] = False  # a ghost batch without a value
        if "small_batch" in options:
            masks[1][:] = False
            masks[1][0, 0, 0] = True  # one value in all
    expected = trained(made(options), plainly, inputs, masks)
    assert_bits(trained(made(options), way, inputs, masks), expected)


@each_way
def test_row_8_without_its_memory_renorm_has_another_gradient(
    way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 8: what these tests are there for can be seen."""
    options = {"statistics": RENORM}
    expected = trained(made(options), plainly, batches())
    monkeypatch.setattr(Memory, "known", lambda _self, known, *_: known)
    found = trained(made(options), way, batches())
    assert torch.equal(found["y0 of step 0"], expected["y0 of step 0"])
    assert not torch.equal(found["dx0 of step 0"], expected["dx0 of step 0"])


@each_way
def test_row_19_one_value_per_channel_is_computed_again_by_what_it_was_normalized_by(way: Way) -> None:
    """Rows 8 and 19: a batch of one goes by the running statistics, which then move, before its backward."""

    def make() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(
            nn.Linear(4, 4), scramble(batchnorm.BatchNorm1d(4, small_batch="running", activation="tanh"))
        )

    torch.manual_seed(4)
    inputs = [torch.randn(n, 4) * 3 for n in (1, 6, 1, 5)]
    assert_bits(trained(make(), way, inputs), trained(make(), plainly, inputs))


@each_way
def test_in_evaluation_adapted_is_computed_again(way: Way) -> None:
    options = {"statistics": batchnorm.Adapted(4)}
    expected = trained(made(options).eval(), plainly, batches())
    assert_bits(trained(made(options).eval(), way, batches()), expected)


def test_second_derivatives_of_what_is_computed_again() -> None:
    """The first pass's r and d stand in the second derivative too."""
    found = []
    for way in (plainly, WAYS["not"]):
        torch.manual_seed(6)
        layer = scramble(batchnorm.BatchNorm2d(4, statistics=RENORM, dtype=torch.float64))
        layer.num_batches_tracked.fill_(9)
        leaves = [x.double().requires_grad_() for x in batches()]
        outputs = [way(layer, leaf) for leaf in leaves]
        loss = sum((y.tanh() * torch.randn_like(y)).sum() for y in outputs)
        gradients = torch.autograd.grad(loss, leaves, create_graph=True)
        sum((g.square() * torch.randn_like(g)).sum() for g in gradients).backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


def test_two_backwards_of_one_graph() -> None:
    """A pass may come again any number of times."""
    layer = scramble(batchnorm.BatchNorm2d(4, statistics=RENORM))
    x, other = batches(2)
    leaf = x.requires_grad_()
    y = WAYS["not"](layer, leaf)
    layer(other)
    (first,) = torch.autograd.grad(y.square().sum(), leaf, retain_graph=True)
    layer(other)
    (second,) = torch.autograd.grad(y.square().sum(), leaf)
    assert torch.equal(first, second)
    assert layer.num_batches_tracked == 3 + 3


def test_lean_within_a_checkpoint() -> None:
    def leanly(net: nn.Module, *a: Any) -> Tensor:
        with batchnorm.lean():
            return net(*a)

    options = {"statistics": RENORM}
    expected = trained(made(options), plainly, batches())
    for way in (WAYS["reentrant"], WAYS["not"]):
        assert_bits(
            trained(made(options), lambda net, *a, way=way: way(leanly, net, *a), batches()), expected
        )


def test_a_memory_is_there_where_it_is_needed_only_and_is_bounded() -> None:
    for options in POLICIES.values():
        net = made(options)
        trained(net, plainly, batches())
        assert net.first._memory is None  # no checkpointing
        trained(net, WAYS["not"], batches())
        needs = "small_batch" in options or "enorm" in str(options) or "Adapted" in str(options)
        assert (net.first._memory is not None) == needs
    layer = scramble(batchnorm.BatchNorm2d(4, statistics=RENORM))
    for _ in range(KEPT + 5):
        with torch.no_grad():
            layer(torch.randn(3, 4, 2, 2))
    assert len(layer._memory._passes) == KEPT


def test_copies_and_files_have_no_memory() -> None:
    layer = scramble(batchnorm.BatchNorm2d(4, statistics=RENORM))
    with torch.no_grad():
        layer(batches()[0])
    assert layer._memory is not None
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (
        copy.deepcopy(layer),
        copy.copy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert other._memory is None
        assert other.statistics == RENORM
    assert list(layer.state_dict()) == list(nn.BatchNorm2d(4).state_dict())


@contextlib.contextmanager
def nothing() -> Any:
    yield


@every_way
@pytest.mark.parametrize("name", ["batch", "renorm", "running", "lenient", "ghost"])
@pytest.mark.parametrize("around", ["outside", "within the last"])
def test_row_8_a_recompute_has_the_mask_of_its_first_pass(name: str, way: Way, around: str) -> None:
    """Rows 2 and 8: the backward is outside of the masks' blocks, or within another mask's."""
    options, inputs = POLICIES[name], batches()
    masks: list[Tensor | None] = [torch.rand(7, 5, 4) > 0.3, None, torch.rand(7, 5, 4) > 0.6]

    def through_contexts(net: nn.Module, way: Way) -> dict[str, Tensor]:
        torch.manual_seed(5)
        found = {}
        for step in range(2):
            leaves = [x.clone().requires_grad_() for x in inputs]
            outputs = []
            for leaf, mask in zip(leaves, masks, strict=True):
                with batchnorm.mask(net, mask):
                    outputs.append(way(net, leaf))
            with nothing() if around == "outside" else batchnorm.mask(net, masks[0]):
                found |= differentiated(net, leaves, outputs, f"of step {step}")
        return found

    expected = through_contexts(made(options), plainly)
    assert_bits(through_contexts(made(options), way), expected)
    assert torch.equal(expected["y0 of step 0"][:, 0] == 0, ~masks[0])


@each_way
def test_row_8_in_evaluation_too_a_recompute_has_its_mask(way: Way) -> None:
    x, mask = batches(1)[0], torch.rand(7, 5, 4) > 0.4
    found = []
    for one in (plainly, way):
        net, leaf = made({}).eval(), x.clone().requires_grad_()
        with batchnorm.mask(net, mask):
            y = one(net, leaf)
        y.backward(torch.ones_like(y))
        found.append({"y": y.detach(), "dx": leaf.grad})
    assert_identical(found[1], found[0])


@each_way
def test_row_8_where_the_mask_is_in_doubt_it_raises(way: Way) -> None:
    """Never without its mask, and never with another's."""
    x = batches(1)[0]
    layer = scramble(batchnorm.BatchNorm2d(4))
    masks = [torch.rand(7, 5, 4) > 0.4 for _ in range(2)]
    outputs = []
    for mask in masks:  # one input, two masks
        leaf = x.clone().requires_grad_()
        with batchnorm.mask(layer, mask):
            outputs.append(way(layer, leaf))
    with pytest.raises(RecomputeError, match=r"^BatchNorm2d: .* two forwards had the same input"):
        outputs[0].sum().backward()

    net, chance = made({}), iter(range(9))

    def by_chance(leaf: Tensor) -> Tensor:
        return net(leaf * next(chance))

    with batchnorm.mask(net, masks[0]):
        y = way(by_chance, x.clone().requires_grad_())
        with pytest.raises(RecomputeError, match="bit for bit"):
            y.sum().backward()


@each_way
def test_one_input_under_one_mask_twice_is_no_doubt(way: Way) -> None:
    layer, x = scramble(batchnorm.BatchNorm2d(4)), batches(1)[0].requires_grad_()
    with batchnorm.mask(layer, torch.rand(7, 5, 4) > 0.4):
        y = way(layer, x) + way(layer, x)
    y.backward(torch.randn_like(y))
    assert layer.num_batches_tracked == 5


@each_way
def test_a_pass_before_any_context_had_none(way: Way) -> None:
    """What was never in a block has no mask, although its backward is in one."""
    found = []
    for one in (plainly, way):
        net, leaf = made({}), batches(1)[0].requires_grad_()
        y = one(net, leaf)
        with batchnorm.mask(net, torch.rand(7, 5, 4) > 0.4):
            torch.manual_seed(1)
            y.backward(torch.randn_like(y))
        found.append({"dx": leaf.grad})
    assert_identical(found[1], found[0])


@each_way
def test_masks_do_not_pile_up(way: Way) -> None:
    """A pass that has come again is forgotten at the next one; an inference holds nothing."""
    net = made({})
    for x in batches(5):
        with batchnorm.mask(net, torch.rand(7, 5, 4) > 0.4):
            y = way(net, x.requires_grad_())
        y.backward(torch.randn_like(y))
        assert len(net.first._scope._passes) == 1
        assert len(net.shared._scope._passes) == 2
    net = made({}).eval()
    with torch.no_grad(), batchnorm.mask(net, torch.rand(7, 5, 4) > 0.4):
        net(x)
        assert not net.first._scope._passes
    assert net.first._scope is None


DOMAINS = {
    "frozen": ({"statistics": batchnorm.Running()}, True),
    "renorm": ({"statistics": RENORM}, True),
    "lenient": ({"small_batch": "running"}, True),
    "evaluation": ({}, False),
    "adapted": ({"statistics": batchnorm.Adapted(4)}, False),
}


@every_way
@pytest.mark.parametrize(("options", "training"), DOMAINS.values(), ids=DOMAINS)
@pytest.mark.parametrize("around", ["outside", "within another"])
def test_row_8_a_recompute_has_the_domain_of_its_first_pass(
    options: dict[str, Any], training: bool, way: Way, around: str
) -> None:
    """Rows 8 and 35: gradients and the statistics of every domain."""
    found = []
    for one in (plainly, way):
        net = made({"domains": 3, **options}).train(training)
        for k in range(3):
            with batchnorm.domain(net, k):
                scramble(net.first)
                scramble(net.shared)
        leaves = [x.clone().requires_grad_() for x in batches()]
        outputs = []
        for k, leaf in enumerate(leaves):
            with batchnorm.domain(net, (k + 1) % 3):
                outputs.append(one(net, leaf))
        torch.manual_seed(5)
        with nothing() if around == "outside" else batchnorm.domain(net, 2):
            result = differentiated(net, leaves, outputs)
        found.append(result | net.state_dict())
    assert_bits(found[1], found[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU, for which the host would wait")
@each_way
def test_the_host_waits_for_nothing(way: Way) -> None:
    """A recompute of Renorm finds its pass on the device."""
    layer = scramble(batchnorm.BatchNorm2d(4, statistics=RENORM)).cuda()
    leaves = [x.cuda().requires_grad_() for x in batches()]
    for _ in range(2):  # the first round compiles
        outputs = [way(layer, leaf) for leaf in leaves]
        loss = sum(y.square().sum() for y in outputs)
        torch.cuda.set_sync_debug_mode("error" if _ else "default")
        try:
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@every_way
def test_one_backward_through_several_passes(way: Way) -> None:
    """The latest pass comes again first."""
    found = []
    for one in (plainly, way):
        net, leaves = made({"statistics": RENORM}), [x.requires_grad_() for x in batches()]
        outputs = [one(net, leaf) for leaf in leaves]
        torch.manual_seed(5)
        torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
        found.append({f"dx{k}": leaf.grad for k, leaf in enumerate(leaves)})
    assert_identical(found[1], found[0])


@pytest.mark.parametrize("name", ["batch", "ghost", "renorm", "lenient"])
def test_compiled_with_what_is_checkpointed(name: str) -> None:
    """The compiler itself computes again: rightly, or not at all."""
    torch.compiler.reset()
    found = []
    mask = torch.ones(7, 5, 4, dtype=torch.bool) if name == "lenient" else None
    for compiles in (False, True):
        net = made(POLICIES[name])
        run: Any = lambda x, net=net: WAYS["not"](net, x, mask)  # noqa: E731
        if compiles:
            run = torch.compile(run, backend="aot_eager", fullgraph=True)
        leaf = batches(1)[0].requires_grad_()
        y = run(leaf)
        torch.manual_seed(5)
        if compiles and name in ("renorm", "lenient"):
            with pytest.raises(RecomputeError, match="leave this layer out of checkpointing"):
                y.backward(torch.randn_like(y))
            continue
        y.backward(torch.randn_like(y))
        found.append({"dx": leaf.grad, **{n: b.double() for n, b in net.named_buffers()}})
    for n, theirs in found[0].items() if len(found) > 1 else ():
        torch.testing.assert_close(found[1][n], theirs, rtol=4e-6, atol=4e-6, msg=n)
    torch.compiler.reset()
