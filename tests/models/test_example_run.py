"""Every verb that takes an example restores what running the model on it changes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import BatchNormError
from batchnorm.models import rollback

VERBS: dict[str, Callable[..., object]] = {
    name: getattr(batchnorm, name) for name in ("inspect", "convert", "fuse", "fold", "revert")
}


def _resize(buffer: Tensor) -> None:
    buffer.resize_(5).fill_(7.0)


def _as_double(buffer: Tensor) -> None:
    buffer.data = buffer.data.double() + 1


def _elsewhere(buffer: Tensor) -> None:
    buffer.data = torch.full((2, 2), 3.0)


def _learns(buffer: Tensor) -> None:
    buffer.requires_grad_(not buffer.requires_grad)


IN_PLACE: dict[str, Callable[[Tensor], object]] = {
    "values": lambda tensor: tensor.add_(1.0),
    "values past the version": lambda tensor: tensor.data.mul_(3.0),
    "size": _resize,
    "dtype": _as_double,
    "memory": _elsewhere,
    "shape": lambda tensor: tensor.t_() if tensor.dim() == 2 else tensor.unsqueeze_(0),
    "requires grad": _learns,
}
BUFFERS: dict[str, Callable[[], Tensor]] = {
    "three": lambda: torch.tensor([1.0, 2.0, 3.0]),
    "none": lambda: torch.empty(0),
    "scalar": lambda: torch.tensor(float("nan")),
    "matrix": lambda: torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).t(),
    "part": lambda: torch.arange(9.0)[2:5],
}


class Restless(nn.Module):
    """A norm and an activation, behind which the forward changes what it can."""

    def __init__(self, change: Callable[[Restless], object], fails: bool) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm1d(3), nn.ReLU()
        self.change, self.fails, self.calls = change, fails, 0
        self.memo: dict[str, int] = {}
        for name, make in BUFFERS.items():
            self.register_buffer(name, make())
        self.register_buffer("twice", self.part)
        self.register_buffer("view", self.matrix[1:, :1])
        self.register_buffer("spread", torch.ones(1).expand(3))
        self.register_buffer("sparse", torch.eye(3).to_sparse())
        self.register_buffer("absent", None)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.fixed = nn.Parameter(torch.zeros(2), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(x))
        self.change(self)
        if self.fails:
            raise RuntimeError("after the change")
        return y if x.sum() < 1e9 else x  # no graph, so that verbs run it


def in_place(name: str, how: str) -> Callable[[Restless], object]:
    def change(model: Restless) -> None:
        with torch.no_grad(), contextlib.suppress(RuntimeError):  # some cannot be changed so
            IN_PLACE[how](getattr(model, name))

    return change


def _register(model: Restless) -> None:
    model.register_buffer("added", torch.ones(2), persistent=False)
    model.more = nn.Parameter(torch.ones(2))
    model.inner = nn.Linear(2, 2)
    model._buffers.pop("three", None)
    model.none = torch.ones(7, dtype=torch.int64)
    model.scale = nn.Parameter(torch.ones(4))
    model.absent = torch.ones(1)


def _attributes(model: Restless) -> None:
    model.calls += 1
    model.memo["x"] = model.calls
    model.act = nn.ReLU()
    model.norm.eps = 0.5
    model.new = "attribute"


CHANGES: dict[str, Callable[[Restless], object]] = {
    **{
        f"{name}: {how}": in_place(name, how)
        for name in (*BUFFERS, "view", "spread", "scale", "fixed")
        for how in IN_PLACE
    },
    "sparse": lambda model: model.sparse.mul_(2.0),
    "registrations": _register,
    "attributes": _attributes,
    "modes": lambda model: model.norm.train(not model.norm.training),
}


def anatomy(model: nn.Module) -> list[object]:
    """Return all that a forward could change, as far as a verb does not change it by its own."""
    found: list[object] = []
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if type(v) in (int, float, str, bool)}
        found.append((name, sorted(module._modules), plain if module is model else module.training))
        found.append(dict(vars(module).get("memo", {})))
        found.append(sorted(module._non_persistent_buffers_set))
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            found.append((key, None if tensor is None else _looks(tensor)))
    return found


def _looks(tensor: Tensor) -> object:
    form = (id(tensor), tensor.dtype, tensor.shape, tensor.requires_grad)
    if tensor.layout is not torch.strided:
        return (*form, str(tensor))
    place = (tensor.stride(), tensor.storage_offset(), tensor.untyped_storage()._cdata)
    return (*form, place, str(tensor.tolist()), tensor.untyped_storage().nbytes())


@pytest.fixture(params=[False, True], ids=["runs", "raises"])
def fails(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def _called(verb: Callable[..., object], model: nn.Module, fails: bool) -> None:
    with pytest.raises(RuntimeError, match="after the change") if fails else contextlib.nullcontext():
        verb(model, example=torch.randn(4, 3))


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_run_changes_is_undone(change: str, fails: bool) -> None:
    model = Restless(CHANGES[change], fails)
    before = anatomy(model)
    _called(batchnorm.convert, model, fails)
    assert anatomy(model) == before


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_undoes_it(verb: str, fails: bool) -> None:
    def everything(model: Restless) -> None:
        for change in CHANGES.values():
            with contextlib.suppress(AttributeError, RuntimeError):
                change(model)

    model = Restless(everything, fails)
    if verb == "revert":
        batchnorm.convert(model)
    before = anatomy(model)
    _called(VERBS[verb], model, fails)
    assert anatomy(model) == before


@pytest.mark.parametrize("verb", VERBS)
def test_all_else_is_undone_where_something_cannot_be(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(model: Restless) -> None:
        _resize(model.none)
        model.three.add_(1)
        model.calls += 1

    model = Restless(change, fails=False)
    before = anatomy(model)
    put_back = rollback._Held.put_back
    failing = iter([True])

    def fail_once(held: Any) -> None:
        if next(failing, False):
            raise ValueError("stuck")
        put_back(held)

    monkeypatch.setattr(rollback._Held, "put_back", fail_once)
    with pytest.raises(BatchNormError, match="cannot be put back, in 1 places: stuck"):
        VERBS[verb](model, example=torch.randn(4, 3))
    assert anatomy(model) == before


def test_an_interrupted_calibration_leaves_what_its_forwards_changed_as_it_was() -> None:
    def data() -> Iterator[Tensor]:
        yield torch.randn(8, 3)
        yield torch.randn(8, 3)
        raise KeyboardInterrupt

    for change in CHANGES.values():
        model = Restless(change, fails=False)
        before = anatomy(model)
        with pytest.raises(KeyboardInterrupt):
            batchnorm.calibrate(model, data())
        assert anatomy(model) == before
