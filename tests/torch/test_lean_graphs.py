"""Row 23: what else torch does with graphs, under `lean`: as without it, or refused as torch refuses it."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.torch import output_recompute
from tests.torch.lean_nets import Around, Residual, Watch, conv, gradients, norm, small_net
from tests.torch.twins import assert_identical, scramble

X = (3, 4, 6, 6)
WRITTEN = "modified by an inplace operation"


def both(run: Callable[[Around], dict[str, Tensor]]) -> None:
    """Raise unless a run under `lean` finds what one without it does, bit for bit."""
    assert_identical(run(batchnorm.lean), run(contextlib.nullcontext))


@pytest.mark.parametrize("what", ["x", "weight", "convolution", "residual", "step"])
def test_row_23_a_write_between_forward_and_backward_is_torch_s_error(what: str) -> None:
    """Row 23: of what the recipe needs and of what is kept as it is; never other gradients."""
    for around in (contextlib.nullcontext, batchnorm.lean):
        layer, last = norm(4), conv(4, 4)
        optimizer = torch.optim.SGD([*layer.parameters(), *last.parameters()], lr=0.1)
        leaf, other = torch.randn(X, requires_grad=True), torch.randn(X, requires_grad=True)
        with around():
            x, residual = leaf * 1, other * 1
            loss = last(layer(x, residual)).sin().sum()
        loss.backward(retain_graph=True)
        written = {"x": x, "weight": layer.weight, "convolution": last.weight, "residual": residual}
        with torch.no_grad():
            optimizer.step() if what == "step" else written[what].mul_(2)
        with pytest.raises(RuntimeError, match=WRITTEN):
            loss.backward()


def test_row_23_a_write_to_the_output() -> None:
    """Row 23: before somebody keeps it: that is what he keeps. After: he has what he saw, an error in
    torch."""

    def run(around: Around) -> dict[str, Tensor]:
        layer = scramble(batchnorm.BatchNorm2d(4))
        leaf = torch.linspace(-3, 2, 432).view(X).sin().requires_grad_()
        with around():
            y = layer(leaf * 1)
            first = y[:, 0].clone()
            y.tanh_()
            loss = (y.sin() + y.square()).sum() + first.sum()
        loss.backward()
        return {"dx": leaf.grad}

    torch.manual_seed(4)
    found = []
    for around in (contextlib.nullcontext, batchnorm.lean):
        torch.manual_seed(4)
        found.append(run(around))
    assert_identical(*found)

    leaf = torch.randn(X, requires_grad=True)
    for around, outcome in (
        (contextlib.nullcontext, pytest.raises(RuntimeError, match=WRITTEN)),
        (batchnorm.lean, contextlib.nullcontext()),
    ):
        with around():
            y = norm(4)(leaf * 1)
            loss = y.sin().sum()
            y.zero_()
        with outcome:
            loss.backward()


def test_row_23_a_residual_that_is_written_to_before_somebody_keeps_it() -> None:
    """Row 23: a norm without activation does not keep its residual; another operator keeps other values."""

    def run(around: Around) -> dict[str, Tensor]:
        torch.manual_seed(2)
        layer = norm(4, None)
        leaf, other = (torch.randn(X, requires_grad=True) for _ in range(2))
        with around():
            residual = other * 1
            y = layer(leaf * 1, residual)
            residual.mul_(2)
            loss = (residual.sin() * 1).sum() + y.sin().sum()
        loss.backward()
        return {"dx": leaf.grad, "dresidual": other.grad}

    both(run)


def test_row_23_nothing_stays_after_an_error_or_without_a_backward() -> None:
    model = small_net(3)
    watch = Watch(model)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:  # noqa: ARG004
            return x.clone()

        @staticmethod
        def backward(ctx: object, dy: Tensor) -> Tensor:  # noqa: ARG004
            raise OSError("on purpose")

    with batchnorm.lean():
        loss = model(torch.randn(X)).sum()
    del loss
    assert watch.alive() == (0, 0)
    with batchnorm.lean():
        loss = model[2:](Fails.apply(model[:2](torch.randn(X)))).sum()
    with pytest.raises(OSError, match="on purpose"):
        loss.backward()
    del loss
    assert watch.alive() == (0, 0)
    with contextlib.suppress(OSError), batchnorm.lean():
        kept = [model(torch.randn(X))]
        raise OSError("within")
    del kept
    assert watch.alive() == (0, 0)
    y = model(torch.randn(X))
    assert watch.alive() == (3, 3), "hooks are there after an error within"
    del y
    assert (len(output_recompute._RECIPES), len(output_recompute._SAVED)) == (0, 0)


def test_row_23_another_graph_keeps_the_output_for_longer() -> None:
    """Row 23: a detached output is kept as it is, its input is freed with the graph of the norm."""
    layer = norm(4)
    watch = Watch(layer)
    weight = torch.randn(X, requires_grad=True)
    with batchnorm.lean():
        y = layer(torch.randn(X, requires_grad=True) * 1)
        other, loss = (y.detach() * weight).sum(), y.square().sum()
        expected = y.detach().clone()
        del y
    loss.backward()
    assert watch.alive() == (0, 1)
    other.backward()
    assert torch.equal(weight.grad, expected)
    assert watch.alive() == (0, 0)


def test_row_23_a_backward_of_a_part_then_of_the_rest() -> None:
    """Row 23: who has not read the output when its norm is done finds it later; nothing else is kept for
    it."""

    def run(around: Around) -> dict[str, Tensor]:
        torch.manual_seed(2)
        model, tails = small_net()[:4], nn.ModuleList(conv(4, 2) for _ in range(3))
        x = torch.randn(X)
        watch = Watch(model)
        with around():
            y = model(x)
            first, second, third = (tail(y).sin().sum() for tail in tails)
            del y
        found = dict(zip("ab", torch.autograd.grad(first, tails[0].weight, retain_graph=True), strict=False))
        second.backward()  # frees what the norms keep
        if around is batchnorm.lean:
            assert watch.alive() == (0, 0)
        found["c"] = torch.autograd.grad(third, tails[2].weight)[0]
        assert watch.alive()[0] == 0
        return found | {n: p.grad for n, p in model.named_parameters()}

    both(run)


def test_row_23_twice_through_one_layer() -> None:
    """Row 23: two forwards before a backward, and two backwards of one forward."""

    def run(around: Around) -> dict[str, Tensor]:
        torch.manual_seed(2)
        model = small_net()
        with around():
            loss = (model(torch.randn(X)).sin() * model(torch.randn(X))).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters()}

    both(run)


def test_row_23_double_backward() -> None:
    """Row 23: a gradient penalty."""

    def run(around: Around) -> dict[str, Tensor]:
        torch.manual_seed(2)
        model = nn.Sequential(small_net(), norm(3, "tanh"), conv(3, 3)).double()
        x = torch.randn(X, dtype=torch.float64, requires_grad=True)
        with around():
            loss = model(x).square().sum()
            (dx,) = torch.autograd.grad(loss, x, create_graph=True)
            penalty = dx.square().sum()
        penalty.backward()
        return {"dx": dx.detach()} | {n: p.grad for n, p in model.named_parameters()}

    both(run)


def test_row_23_a_batch_of_cotangents() -> None:
    def run(around: Around) -> dict[str, Tensor]:
        torch.manual_seed(2)
        model, x = small_net(), torch.randn(X, requires_grad=True)
        with around():
            y = model(x)
        cotangents = torch.randn(2, *y.shape)
        return {"dx": torch.autograd.grad(y, x, cotangents, is_grads_batched=True)[0]}

    both(run)


def test_row_23_autocast() -> None:
    def run(around: Around) -> dict[str, Tensor]:
        torch.manual_seed(2)
        model = nn.Sequential(conv(4, 4), norm(4), Residual(4, (4, 4)), Residual(4, (6, 6)), conv(6, 2))
        watch = Watch(model)
        with torch.autocast("cpu", torch.bfloat16), around():
            loss = model(torch.randn(X)).float().sin().sum()
        alive.append(watch.alive()[1])
        loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    alive: list[int] = []
    both(run)
    assert alive == [0, 6]


@contextlib.contextmanager
def lean_within(outer: Around) -> object:
    with outer(), batchnorm.lean():
        yield


@contextlib.contextmanager
def lean_around(inner: Around) -> object:
    with batchnorm.lean(), inner():
        yield


def doubling() -> saved_tensors_hooks:
    return saved_tensors_hooks(lambda t: t.detach().clone(), lambda t: t)


@pytest.mark.parametrize("hooks", [save_on_cpu, doubling, batchnorm.lean])
@pytest.mark.parametrize("order", [lean_within, lean_around])
def test_row_23_nested_hooks(order: Callable[[Around], object], hooks: Around) -> None:
    """Row 23: torch asks the innermost pair; `lean` within itself is `lean`."""
    model, x = small_net(), torch.randn(X)
    assert_identical(gradients(model, x, lambda: order(hooks)), gradients(model, x))
    watch = Watch(model)
    with order(hooks):
        loss = model(x).sum()
    is_lean = order is lean_within or hooks is batchnorm.lean
    assert (watch.alive()[1] == 0) == (is_lean or hooks is doubling)
    loss.backward()
    assert (len(output_recompute._RECIPES), len(output_recompute._SAVED)) == (0, 0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_row_8_checkpointing_within_and_around(reentrant: bool) -> None:
    """Row 8: a checkpointed part recomputes as it does without, and statistics move once in either."""

    class Partly(nn.Module):
        def __init__(self, around: Around) -> None:
            super().__init__()
            self.first, self.part, self.last = small_net()[:4], small_net()[:4], conv(4, 3)
            self.around = around

        def _part(self, x: Tensor) -> Tensor:
            with self.around():
                return self.part(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self._part, self.first(x), use_reentrant=reentrant))

    x = torch.randn(X)
    expected = gradients(Partly(contextlib.nullcontext), x)
    assert_identical(gradients(Partly(contextlib.nullcontext), x, batchnorm.lean), expected)
    for around in (contextlib.nullcontext, batchnorm.lean):
        found = gradients(Partly(batchnorm.lean), x, around)
        assert [int(of["part.1.num_batches_tracked"]) - 3 for of in (expected, found)] == [2, 2]
        assert_identical(found, expected)


def test_row_23_threads() -> None:
    """Row 23: a context holds in its thread; the backward may run in another, and after it."""
    models = [small_net(), small_net()]
    watches = [Watch(model) for model in models]
    losses: list[Tensor] = []
    entered, done = threading.Event(), threading.Event()
    number = torch.get_num_threads()  # that a thread computes with: its own, or the bits differ

    def other() -> None:
        torch.set_num_threads(number)
        try:
            entered.wait()
            losses.append(models[0](torch.ones(X)).square().sum())
        finally:
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with batchnorm.lean():
        entered.set()
        done.wait()
        losses.append(models[1](torch.ones(X)).square().sum())
    thread.join()
    assert watches[0].alive() == (2, 2)
    assert watches[1].alive() == (2, 0)

    def differentiate() -> None:
        torch.set_num_threads(number)
        losses[1].backward()

    backward = threading.Thread(target=differentiate)
    backward.start()
    backward.join()
    losses[0].backward()
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_row_23_no_op_under_torch_compile() -> None:
    """Row 23: within a compiled function it is nothing, and around one, compiled parts keep what they
    keep."""
    model, x = small_net(), torch.randn(X)
    torch.compiler.reset()

    def within(x: Tensor) -> Tensor:
        with batchnorm.lean():
            return model(x).square().sum()

    twin = copy.deepcopy(model)
    plain = torch.compile(lambda x: twin(x).square().sum(), backend="aot_eager", fullgraph=True)
    plain(x).backward()
    for around, call in (
        (contextlib.nullcontext, torch.compile(within, backend="aot_eager", fullgraph=True)),
        (batchnorm.lean, torch.compile(within, backend="aot_eager", fullgraph=True)),
        (
            batchnorm.lean,
            lambda x: torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum(),
        ),
    ):
        model.zero_grad()
        with around():
            loss = call(x)
        loss.backward()
        pairs = zip(model.parameters(), twin.parameters(), strict=True)
        assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    torch.compiler.reset()


def test_row_23_no_op_within_torch_func() -> None:
    """Row 23: within a transform it is nothing; around one, torch refuses any hooks of its kind."""
    layer = scramble(batchnorm.BatchNorm2d(4, activation="tanh", track_running_stats=False))
    parameters = dict(layer.named_parameters())
    x, dx = torch.randn(X), torch.randn(X)

    def loss(parameters: dict[str, Tensor], around: Around) -> Tensor:
        with around():
            return functional_call(layer, parameters, (x,)).sin().sum()

    found = grad(lambda p: loss(p, batchnorm.lean))(parameters)
    assert_identical(found, grad(lambda p: loss(p, contextlib.nullcontext))(parameters))
    with batchnorm.lean(), pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"):
        grad(lambda p: loss(p, contextlib.nullcontext))(parameters)
    plain, tangent = vmap(layer)(x[None]), jvp(layer, (x,), (dx,))[1]
    with batchnorm.lean():
        assert torch.equal(vmap(layer)(x[None]), plain)
        assert torch.equal(jvp(layer, (x,), (dx,))[1], tangent)


def test_row_23_without_gradients_it_is_nothing() -> None:
    model, x = small_net(), torch.randn(X)
    with batchnorm.lean(), torch.no_grad():
        y = model(x)
    assert y.grad_fn is None
    model.requires_grad_(False)
    with batchnorm.lean():
        assert model(x).grad_fn is None
    assert (len(output_recompute._RECIPES), len(output_recompute._SAVED)) == (0, 0)
