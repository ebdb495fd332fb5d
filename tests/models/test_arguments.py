"""Verbs and contexts name wrong arguments, and accept every form that users expect."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import ArgumentTypeError, InputShapeError, InputTypeError, OptionError
from tests.torch.twins import assert_identical, scramble, state

VERBS: dict[str, tuple[Any, ...]] = {
    "inspect": (),
    "convert": (),
    "fuse": (),
    "fold": (),
    "freeze": (),
    "unfreeze": (),
    "revert": (),
    "calibrate": ([torch.ones(2, 3)],),
    "mask": (None,),
    "domain": (0,),
    "accumulate": (2,),
}
WRONG = {
    "class": (nn.BatchNorm1d, "the class BatchNorm1d: pass an instance"),
    "int": (3, "got an int"),
    "None": (None, "got None"),
    "list": ([nn.BatchNorm1d(3)], "got a list: call {verb} for each, or pass an nn.ModuleList"),
    "tuple": ((nn.BatchNorm1d(3),), "got a tuple: call {verb} for each"),
    "dict": ({"a": nn.BatchNorm1d(3)}, "got a dict: pass each model, or an nn.ModuleDict"),
    "state": (nn.BatchNorm1d(3).state_dict(), "got an OrderedDict: load it into a model"),
    "tensor": (torch.ones(3), "got a Tensor"),
    "Keras": (
        type("Sequential", (), {"__module__": "keras.src.models"})(),
        "a Keras Sequential: batchnorm.keras has",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("verb", VERBS)
def test_an_argument_that_is_no_model_is_named(verb: str, wrong: str) -> None:
    value, message = WRONG[wrong]
    with pytest.raises(ArgumentTypeError) as caught, contextlib.ExitStack() as stack:
        stack.enter_context(getattr(batchnorm, verb)(value, *VERBS[verb]))
    assert str(caught.value).startswith(f"{verb} takes a model or layer of torch (nn.Module); got ")
    assert message.format(verb=verb) in str(caught.value)
    assert isinstance(caught.value, (TypeError, ValueError))


def test_other_functions_name_the_wrong_argument() -> None:
    with pytest.raises(ArgumentTypeError, match=r"convert_sync_batchnorm takes a model.*got a list"):
        batchnorm.SyncBatchNorm.convert_sync_batchnorm([nn.BatchNorm1d(3)])
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'model'"):
        batchnorm.freeze()
    with pytest.raises(ArgumentTypeError, match=r"^mask takes a model.*got a Tensor"):
        batchnorm.mask(MASK, nn.BatchNorm1d(3)).__enter__()
    assert next(iter(inspect.signature(batchnorm.convert).parameters)) == "model"
    assert batchnorm.freeze(model=nn.BatchNorm1d(3)).statistics == batchnorm.Running()


@pytest.mark.parametrize("method", ["batch", "layerwise"])
@pytest.mark.parametrize("where", ["all", "a part", "a lazy one"])
def test_calibrate_names_what_is_on_meta(method: str, where: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    name = {"all": "0.weight", "a part": "1.weight", "a lazy one": "1.weight"}[where]
    if where == "a lazy one":
        model[1] = nn.LazyBatchNorm1d(device="meta")
    (model if where == "all" else model[1]).to("meta")
    with pytest.raises(OptionError, match=rf"Sequential is on the meta device \({name}\).*assign=True"):
        batchnorm.calibrate(model, [torch.randn(4, 3)], method=method)
    if where == "all":
        model.load_state_dict(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).state_dict(), assign=True)
        batchnorm.calibrate(model, [torch.randn(4, 3)], method=method)


@pytest.mark.parametrize("verb", ["convert", "fuse", "fold", "revert"])
def test_examples_on_meta_compare_nothing(verb: str) -> None:
    with torch.device("meta"):
        model, example = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU()), torch.ones(4, 3)
    with pytest.raises(OptionError, match="meta device, so that there are no values to compare: pass no ex"):
        getattr(batchnorm, verb)(model, example=example)
    assert type(model[1]) is nn.BatchNorm1d
    getattr(batchnorm, verb)(model)


def test_convert_sets_options_on_every_layer_or_none() -> None:
    model = nn.Sequential(
        nn.BatchNorm1d(3), batchnorm.BatchNorm1d(3, nonfinite="raise"), nn.LazyBatchNorm1d()
    )
    batchnorm.convert(model, batchnorm.Ghost(2), nonfinite="skip", small_batch="running")
    model(torch.full((4, 3), float("inf")))
    for layer in model:
        assert (layer.nonfinite, layer.small_batch, layer.statistics) == (
            "skip",
            "running",
            batchnorm.Ghost(2),
        )
    assert model[0].skipped == 1
    batchnorm.convert(model)
    assert model[0].nonfinite == "skip"
    wrong = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False))
    for options, message in (
        ({"small_batch": "running"}, r"^1 \(torch.nn.BatchNorm1d\): small_batch=.*track_running_stats=True"),
        ({"nonfinite": "skip"}, r"^1 \(torch.nn.BatchNorm1d\): nonfinite="),
        ({"nonfinite": "ignore"}, r"^0 \(torch.nn.BatchNorm1d\): nonfinite must be"),
    ):
        with pytest.raises(OptionError, match=message):
            batchnorm.convert(wrong, **options)
        assert type(wrong[0]) is nn.BatchNorm1d
    batchnorm.convert(wrong, nonfinite="raise", small_batch="raise")
    taken_back = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(ZeroDivisionError):
        batchnorm.convert(taken_back, nonfinite="skip", example=Failing())
    assert "skipped" not in taken_back[0]._non_persistent_buffers_set


class Failing:
    """An example that raises when it is used."""

    def __getattr__(self, name: str) -> Any:
        raise ZeroDivisionError(name)


class Words(nn.Module):
    """Embeds tokens `[N, L]`, halves the length, and normalizes at both lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.first = nn.Embedding(20, 4), scramble(batchnorm.BatchNorm1d(4))
        self.conv, self.second = nn.Conv1d(4, 3, 2, 2), scramble(batchnorm.BatchNorm1d(3))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.embed(tokens).movedim(1, 2))))


LENGTHS = torch.tensor([10, 4, 7])
MASK = torch.arange(10) < LENGTHS.unsqueeze(1)


@pytest.mark.parametrize("how", ["read off", "size", "compiled", "keyword", "twice"])
def test_mask_takes_lengths(how: str) -> None:
    torch.manual_seed(1)
    model = Words()
    torch.manual_seed(1)
    twin = Words()
    tokens = torch.randint(20, (3, 10))
    called = torch.compile(model, backend="aot_eager") if how == "compiled" else model
    size = {"size": 10} if how == "size" else {}
    with batchnorm.mask(called, lengths=LENGTHS, **size):
        y = called(tokens=tokens) if how == "keyword" else called(tokens)
        if how == "twice":  # padded further: the same values count
            y = called(nn.functional.pad(tokens, (0, 4)))[..., :5]
    with batchnorm.mask(twin, MASK):
        z = twin(tokens)
        z = twin(tokens) if how == "twice" else z
    torch.testing.assert_close(y, z, rtol=1e-6, atol=1e-6)
    for key, value in state(model).items():
        torch.testing.assert_close(value, state(twin)[key], rtol=1e-6, atol=1e-6)
    assert not model._forward_pre_hooks
    assert model.first._scope is None


def test_mask_of_lengths_for_sequences_of_channels() -> None:
    x, layer, twin = torch.randn(3, 5, 10), batchnorm.BatchNorm1d(5), batchnorm.BatchNorm1d(5)
    with batchnorm.mask(layer, lengths=LENGTHS):
        y = layer(x)
    assert torch.equal(y, twin(x, lengths=LENGTHS))
    assert_identical(state(layer), state(twin))


def test_ambiguous_lengths_are_refused() -> None:
    model = nn.Sequential(batchnorm.BatchNorm1d(10))
    cases = [
        (torch.randn(3, 10, 12), r"either axis may be that of positions\. Pass size="),  # [N, L, C], perhaps
        (torch.randn(3, 10, 6), r"either axis|lengths must be 0 to 6"),
        (torch.randn(3, 4, 9), r"lengths must be 0 to 9, the padded length; got 4 to 10"),
        (torch.randn(3, 4, 10, 2), r"has shape \[3, 4, 10, 2\]: pass size="),
    ]
    for x, message in cases:
        with batchnorm.mask(model, lengths=LENGTHS), pytest.raises(OptionError, match=message):
            model(x)
    with batchnorm.mask(model, lengths=LENGTHS), pytest.raises(OptionError, match=r"not called: pass size="):
        model[0](torch.randn(3, 10, 12))
    with batchnorm.mask(model, lengths=LENGTHS, size=12):
        model[0](torch.randn(3, 10, 12))
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"lengths": [1, 2]}, InputTypeError, "tensor of integers.*got a list"),
        ({"lengths": torch.rand(3)}, InputTypeError, "got torch.float32"),
        ({"lengths": LENGTHS[None]}, InputShapeError, r"shape \[1, 3\]"),
        ({"lengths": LENGTHS, "size": 9}, OptionError, "0 to 9"),
        ({"lengths": LENGTHS, "size": "12"}, OptionError, "size must be"),
        ({"lengths": LENGTHS, "mask": MASK}, OptionError, "one of them"),
        ({}, OptionError, "one of them"),
        ({"mask": MASK, "size": 10}, OptionError, "goes with lengths="),
    ]
    for arguments, error, message in wrong:
        with pytest.raises(error, match=message), batchnorm.mask(model, **arguments):
            pass
    assert not model._forward_pre_hooks
    assert model[0]._scope is None


@pytest.mark.parametrize("kind", ["leaf", "made by an operation"])
@pytest.mark.parametrize(
    "verb", ["inspect", "convert", "fuse", "fold", "revert", "freeze", "calibrate", "layerwise"]
)
def test_running_statistics_that_require_grad_are_values_like_others(verb: str, kind: str) -> None:
    torch.manual_seed(5)
    x = torch.randn(6, 3)
    plain = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU())
    scramble(plain[1])
    model = copy.deepcopy(plain)
    for name in ("running_mean", "running_var"):
        buffer = model[1]._buffers[name].clone().requires_grad_()
        model[1]._buffers[name] = buffer if kind == "leaf" else buffer * 1
    found = []
    for one in (plain, model):
        given = {"calibrate": ([x],), "layerwise": ([x],), "freeze": ()}.get(verb, (x,))
        options = {"method": "layerwise"} if verb == "layerwise" else {}
        if verb in ("convert", "revert"):
            given, options = (), {"example": x}
        result = getattr(batchnorm, "calibrate" if verb == "layerwise" else verb)(one, *given, **options)
        with torch.no_grad():  # a stock layer refuses such statistics where it differentiates
            found.append((str(result), (result if isinstance(result, nn.Module) else one).eval()(x)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=0)
