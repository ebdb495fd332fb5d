"""Each verb within each context: right, or refused by name."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.torch import lean as lean_module
from tests.torch.twins import assert_identical, scramble, state

Context = Callable[[nn.Module], contextlib.AbstractContextManager[Any]]
X = torch.linspace(-2, 3, 6 * 3 * 8).sin().view(6, 3, 8)
MASK = torch.arange(8) < torch.tensor([8, 3, 5, 8, 1, 6]).unsqueeze(1)
CONTEXTS: dict[str, Context] = {
    "mask": lambda model: batchnorm.mask(model, MASK),
    "no mask": lambda model: batchnorm.mask(model, None),
    "domain": lambda model: batchnorm.domain(model, 1),
    "domain with weights": lambda model: batchnorm.domain(model, 1),
    "accumulate": lambda model: batchnorm.accumulate(model, 2),
    "lean": lambda _: batchnorm.lean(),
    "autocast": lambda _: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference_mode": lambda _: torch.inference_mode(),
    "no_grad": lambda _: torch.no_grad(),
}
VERBS = ("inspect", "convert", "fuse", "freeze", "unfreeze", "revert", "fold", "calibrate", "script")
REFUSED = {
    ("fold", "mask"): "a folded norm heeds no mask",
    ("fuse", "mask"): "masks what it adds and its activation",
    ("revert", "mask"): "a stock layer heeds no mask",
    ("revert", "accumulate"): "a stock layer moves its statistics in every forward",
    ("revert", "domain"): "domains=2, which no stock layer has",
    ("script", "mask"): "which no stock layer heeds",
    ("script", "accumulate"): "which no stock layer heeds",
    ("script", "domain"): "with domains=2",
    ("revert", "domain with weights"): "domains=2, which no stock layer has",
    ("script", "domain with weights"): "with domains=2",
}


def net(context: str = "") -> nn.Module:
    """Conv – norm – relu – conv – norm, with a different past in each domain, and weights if it says so."""
    domains = 2 if context.startswith("domain") else 1
    options = {"domains": domains, "domain_affine": context == "domain with weights"}
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1),
        scramble(batchnorm.BatchNorm1d(4, **options)),
        nn.ReLU(),
        nn.Conv1d(4, 2, 3, padding=1),
        scramble(batchnorm.BatchNorm1d(2, **options)),
    )
    for norm in (model[1], model[4]) if domains > 1 else ():
        with batchnorm.domain(norm, 1):
            scramble(norm)
        for parameter in norm.parameters():
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def call(verb: str, model: nn.Module) -> nn.Module:
    if verb == "script":
        return torch.jit.script(model)
    if verb == "calibrate":
        batchnorm.calibrate(model, [X])
        return model
    found = getattr(batchnorm, verb)(model)
    return found if isinstance(found, nn.Module) else model


def outputs(model: nn.Module) -> list[Tensor]:
    """Return outputs in evaluation, outputs of two training steps, and the state after these."""
    found = [model.eval()(X).detach()]
    model.train()
    for _ in range(2):
        y = model(X)
        y.backward(torch.linspace(0, 1, y.numel()).view_as(y).cos())
        found.append(y.detach())
    found += [p.grad for p in model.parameters() if p.grad is not None]
    return found + list(state(model).values())


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_in_each_context(verb: str, context: str) -> None:
    """A model changed within the context behaves, outside of it, like one changed outside."""
    model, twin = net(context), net(context)
    reason = REFUSED.get((verb, context))
    if reason is not None:
        before = state(model)
        with CONTEXTS[context](model), pytest.raises(OptionError, match=reason):
            call(verb, model)
        assert_identical(state(model), before)
        return
    with CONTEXTS[context](model):
        inside = call(verb, model)
    with CONTEXTS[context](twin) if context.startswith("domain") else contextlib.nullcontext():
        outside = call(verb, twin)
    assert type(inside) is type(outside)
    for tensor in (*inside.parameters(), *inside.buffers()):
        assert not tensor.is_inference()
    expected = outputs(outside)
    if verb == "calibrate" and context == "mask":  # it heeds the mask, with its own tests
        return
    tolerance = 2e-2 if context == "autocast" and verb == "calibrate" else 0
    for found, wanted in zip(outputs(inside), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("verb", ["fuse", "freeze", "calibrate", "convert", "unfreeze"])
def test_accumulate_goes_on_around_a_verb(verb: str) -> None:
    """Two forwards move the statistics once, also where a verb ran between them; frozen ones do not move."""
    model, twin = net(), net()
    with batchnorm.accumulate(model, 2):
        model(X)
        call(verb, model)
        model.train()
        model(X + 1)
    if verb == "calibrate":
        call(verb, twin)
    if verb != "freeze":
        with batchnorm.accumulate(twin, 2):
            twin(X)
            twin(X + 1)
    for found, wanted in zip(model.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_a_context_would_not_heed_is_refused() -> None:
    model = net()
    with batchnorm.accumulate(model, 2):
        with pytest.raises(OptionError, match=r"within batchnorm\.accumulate, which moves them once"):
            batchnorm.convert(model, batchnorm.Ghost(2, sequential=True))
        assert model[1].statistics == batchnorm.Batch()
        for export in (lambda: torch.jit.trace(model, X), lambda: torch.export.export(model, (X,))):
            with pytest.raises(OptionError, match="accumulate cannot be exported in training"):
                export()
        torch.export.export(copy.deepcopy(model).eval(), (X,))
    mixed = nn.Sequential(net("domain"), nn.BatchNorm1d(2))
    with batchnorm.domain(mixed, 1):
        with pytest.raises(OptionError, match=r"^1 \(torch.nn.BatchNorm1d\): the model is within"):
            batchnorm.convert(mixed, domains=2)
        batchnorm.convert(mixed)


@pytest.mark.parametrize("example", [None, X], ids=["no example", "example"])
def test_a_fold_within_a_mask_is_refused_and_a_folded_model_takes_none(example: Tensor | None) -> None:
    """At valid positions it was off by 0.77 of 1.81: the convolution behind reads what the mask cleared."""
    model = net().eval()
    with batchnorm.mask(model, MASK), pytest.raises(OptionError, match=r"^1 \(batchnorm.BatchNorm1d\): fold"):
        batchnorm.fold(model, example)
    partly = nn.Sequential(*net()[:3], batchnorm.BatchNorm1d(4)).eval()
    folded = copy.deepcopy(batchnorm.fold(partly, example))
    with pytest.raises(OptionError, match=r"^1: its norm is folded"), batchnorm.mask(folded, MASK):
        pass
    with batchnorm.mask(folded, None):
        folded(X)


def test_a_fused_layer_masks_more_which_is_why_fuse_refuses() -> None:
    """Sigmoid of a masked 0 is 0.5, which a convolution behind reads; fused it is 0."""
    model = nn.Sequential(
        scramble(batchnorm.BatchNorm1d(3)), nn.Sigmoid(), nn.Conv1d(3, 2, 3, padding=1)
    ).eval()
    fused = batchnorm.fuse(copy.deepcopy(model))
    with batchnorm.mask(model, MASK), batchnorm.mask(fused, MASK):
        assert (model(X) - fused(X)).abs()[MASK.unsqueeze(1).expand(-1, 2, -1)].max() > 0.1


@pytest.fixture
def untold() -> Any:
    before = set(lean_module._warned)
    lean_module._warned.clear()
    yield
    lean_module._warned.clear()
    lean_module._warned.update(before)


def stock() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 3))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU(inplace=True), nn.SiLU(), nn.GELU(), nn.Identity()]
)
@pytest.mark.usefixtures("untold")
def test_lean_says_once_where_it_saves_nothing_and_what_helps(activation: nn.Module) -> None:
    model = stock()
    model[2] = activation
    message = r"lean saves next to nothing.*batchnorm\.convert.*fuse"
    with pytest.warns(UserWarning, match=message) as caught, batchnorm.lean():
        model(X)
    assert caught[0].filename == __file__
    with batchnorm.lean():  # once: a warning would be an error here
        model(X)
    batchnorm.convert(model)
    if isinstance(activation, nn.ReLU):
        message = r"not part of them: batchnorm\.fuse\(model, example\)"
        with pytest.warns(UserWarning, match=message), batchnorm.lean():
            model(X)
    lean_module._warned.clear()
    batchnorm.fuse(model, X)
    with batchnorm.lean():  # both remedies followed
        model(X)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv1d(3, 3, 3, padding=1), nn.BatchNorm1d(3), nn.Conv1d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.relu(self.norm(self.conv(x)) + x))


@pytest.mark.usefixtures("untold")
def test_lean_knows_residuals_and_what_is_no_norm() -> None:
    model = Residual()
    for remedy, change in (("convert", batchnorm.convert), ("fuse", batchnorm.fuse)):
        with pytest.warns(UserWarning, match=rf"batchnorm\.{remedy}"), batchnorm.lean():
            model(X)
        change(model)
    lean_module._warned.clear()
    with batchnorm.lean():
        model(X)
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv1d(4, 1, 1))(X)
        nn.Sequential(nn.Conv1d(3, 4, 1), nn.InstanceNorm1d(4), nn.PReLU(), nn.Conv1d(4, 1, 1))(X)
    with batchnorm.lean(), torch.no_grad():
        stock()(X)
