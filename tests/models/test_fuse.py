"""`batchnorm.fuse`: one layer instead of two or three, the same numbers, the original forward if in doubt."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.kernels.activations import ACTIVATIONS
from batchnorm.models import fuse as fuse_module
from batchnorm.models.fusion.fused_activation import FusedActivation
from batchnorm.models.fusion.rewrite import FusedForward
from batchnorm.models.graph import recorded
from batchnorm.models.norms import activations
from batchnorm.models.norms.kinds import is_ours
from batchnorm.models.verify import AgreementError
from tests.models import nets
from tests.models.foreign import timm_norm  # noqa: F401 -- a fixture
from tests.models.nets import anatomy, assert_alike, refuses, scrambled
from tests.torch.test_layers import MODULES

X = (5, 4, 6, 6)


def _input(*shape: int) -> Tensor:
    return torch.randn(shape or X, dtype=torch.float64)


def fused(model: nn.Module, example: Tensor | None = None) -> dict[str, str]:
    """Fuse a model; return what became one layer with each norm, after checking that it did."""
    norms = {row.name: model.get_submodule(row.name) for row in batchnorm.inspect(model).rows}
    before = {name: (type(norm), getattr(norm, "activation", None)) for name, norm in norms.items()}
    planned = {row.name: row.fuses_with for row in batchnorm.inspect(model, example).rows if row.fuses_with}
    assert batchnorm.fuse(model, example) is model
    for name, norm in norms.items():
        if name not in planned:
            assert (type(norm), getattr(norm, "activation", None)) == before[name], name
            continue
        *_, last = planned[name].partition(" (")[0].split(", ")
        assert is_ours(norm), name
        assert norm.activation == (None if last == "add" else last), name
    return planned


def _reasons(model: nn.Module, example: Tensor | None = None) -> dict[str, str]:
    return {row.name: row.reason for row in batchnorm.inspect(model, example).rows if row.reason}


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool, dict[str, str]]] = {
    # name: how it is made, its input, whether it needs an example, what must be fused
    "resnet": (
        nets.resnet,
        (4, 3, 6, 6),
        False,
        {"0.1": "gelu", "1.bn1": "relu", "1.bn2": "add, relu", "2.bn1": "relu", "2.bn2": "add, relu"},
    ),
    "in children": (nets.Residual, X, False, {"layer.0.norm": "silu", "layer.1.norm": "add, tanh"}),
    "functions": (nets.Functional, X, False, {"a": "sigmoid", "b": "relu"}),
    "branching": (nets.Branching, X, True, {"norm": "hardswish (as on the example)"}),
    "looping": (nets.Looping, X, False, {"norms.0": "relu", "norms.1": "relu"}),
    "broadcast": (nets.Broadcast, X, False, {"norm": "add, relu"}),
}


@pytest.mark.parametrize("with_example", [True, False], ids=["example", "graph"])
@pytest.mark.parametrize("name", NETS)
def test_a_fused_network_trains_as_before(name: str, with_example: bool) -> None:
    """Pain row 24 (fused norm and activation, exact, nothing to build): gradients and statistics too."""
    make, shape, needs_example, expected = NETS[name]
    stock = scrambled(make())
    model, x = copy.deepcopy(stock), _input(*shape)
    found = fused(model, x if with_example else None)
    assert found == ({} if needs_example and not with_example else expected)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert_alike(model, stock, x)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_fuses(activation: str) -> None:
    """Pain row 24: any activation, where In-Place ABN has no ReLU (its issue 143)."""
    stock = scrambled(
        nn.Sequential(nn.BatchNorm2d(4), copy.deepcopy(MODULES[activation]), nn.Conv2d(4, 4, 1))
    )
    model = copy.deepcopy(stock)
    assert fused(model) == {"0": activation}
    assert isinstance(model[1], nn.Identity)
    assert model[0].activation == activation
    assert type(MODULES[activation]).__name__ in repr(model[1])
    assert_alike(model, stock, _input())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_modules_and_functions_of_a_name_compute_the_same(name: str) -> None:
    module, x = activations.module_for(name), torch.randn(50)
    assert activations.module_activation(module) == name
    assert torch.equal(activations.FUNCTIONS[name](x), module(x))


@pytest.mark.parametrize(
    "act",
    [nn.LeakyReLU(0.2), nn.GELU("tanh"), nn.ELU(0.5), nn.Softplus(), nn.Hardtanh(), nn.Dropout(0.1)],
    ids=str,
)
def test_activations_that_no_layer_has_are_left(act: nn.Module) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), act)
    batchnorm.fuse(model)
    assert type(model[0]) is nn.BatchNorm2d
    assert _reasons(model) == {"0": f"its output goes to 1 ({type(act).__name__})"}


class Twice(nn.Module):
    """The norm's output has two readers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.act(y) + y


class CalledTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.act(self.norm(x)))


class WritesResidual(nn.Module):
    """The addition is in place, into what the norm is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        g = h * 1.0
        g += self.norm(x)
        return torch.relu(g) + h


class Optional(nn.Module):
    """Given as a symbol, None would not be None."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.SiLU()

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = self.norm(x)
        return self.act(y) if scale is not None else y * 2


class AsksForClass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y * 2 if isinstance(x, Tensor) else self.act(y)


class Random(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.act(y) if torch.rand(()) > 2 else y


class ByMode(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.act(y) if self.training else y


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([self.act(y), y]) if x.sum() < 1e9 else y


class Viewed(nn.Module):
    """A view of the norm's output is read beside the activation, in a forward that is no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        v = y.flatten(1)
        z = self.act(y)
        return z + v.view_as(z) if x.sum() < 1e9 else z


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: object, dy: Tensor) -> Tensor:
        return -dy


class Reversed(nn.Module):
    """The activation reads the same values, with another gradient, in a forward that is no graph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        z = self.act(_Reverse.apply(self.norm(x)))
        return z if x.sum() < 1e9 else x


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Reversed, "no graph|is read 2 times"),
        (Twice, "read 2 times"),
        (CalledTwice, "called 2 times"),
        (WritesResidual, "goes to iadd"),
        (Optional, "optional arguments|goes to"),
        (AsksForClass, "class of a value|goes to"),
        (Random, "random numbers|goes to|no graph|output is read"),
        (ByMode, "another in training|goes to|no reader|read 0|model's output"),
        (Returned, "no graph|is read"),
        (Viewed, "no graph|is read"),
    ],
)
def test_norms_that_cannot_be_fused_are_left_with_a_reason(make: type[nn.Module], reason: str) -> None:
    stock = scrambled(make())
    for example in (None, _input()):
        model = copy.deepcopy(stock)
        assert not fused(model, example)
        (told,) = _reasons(model, example).values()
        assert any(part in told for part in reason.split("|")), told
        assert type(model.norm) is nn.BatchNorm2d
        assert_alike(model, stock, _input())


@pytest.mark.parametrize("with_example", [True, False])
@pytest.mark.parametrize("names", [("left", "right"), ("right", "left")], ids=str)
def test_a_residual_that_another_norm_has_activated(names: tuple[str, str], with_example: bool) -> None:
    """Two branches, one of them norm → relu, and their sum: the sum is of what became one layer."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in names:  # sites are found in the order of modules
                self.add_module(name, nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.left(x.sin()) + self.right(x * 2).relu()

    stock, x = scrambled(Branches()), torch.randn(5, 4, 3, 3, dtype=torch.float64)
    model = batchnorm.fuse(batchnorm.convert(copy.deepcopy(stock)), example=x if with_example else None)
    assert {row.name: row.activation for row in batchnorm.inspect(model).rows} == {
        "left": None,
        "right": "relu",
    }
    assert_alike(model, stock, x)


def test_in_place_activations_and_shared_modules() -> None:
    shared = nn.BatchNorm2d(4)
    stock = scrambled(
        nn.Sequential(nn.Conv2d(4, 4, 1), shared, nn.ReLU(inplace=True), shared, nn.ReLU(inplace=True))
    )
    model = copy.deepcopy(stock)
    assert not fused(model)
    assert _reasons(model) == {"1": "it is shared: 1, 3"}
    assert_alike(model, stock, _input())


def test_one_activation_module_behind_two_norms_of_a_sequential() -> None:
    act = nn.ReLU(inplace=True)
    stock = scrambled(nn.Sequential(nn.BatchNorm2d(4), act, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), act))
    model, x = copy.deepcopy(stock), _input()
    found = fused(model, x)
    assert_alike(model, stock, x)
    assert found == {"0": "relu", "3": "relu"}


def test_hooks_keep_what_they_see() -> None:
    """A hook on a norm's output or on an activation forbids the fusion of that pair."""
    for place in ("bn1", "relu"):
        model = nets.Basic(4)
        seen: list[Tensor] = []
        model.get_submodule(place).register_forward_hook(lambda _m, _a, y, seen=seen: seen.append(y.clone()))
        stock = copy.deepcopy(model)
        batchnorm.fuse(model)
        x = torch.randn(X)
        model(x), stock(x)
        half = len(seen) // 2
        assert half
        torch.testing.assert_close(seen[:half], seen[half:])


def test_an_attribute_keeps_the_output_of_a_norm() -> None:
    class Keeps(nn.Module):
        kept: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act = nn.BatchNorm2d(4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            self.kept = self.norm(x)
            return self.act(self.kept) if x.sum() < 1e9 else x

    model, x = scrambled(Keeps()), _input()
    assert not fused(model, x)
    assert _reasons(model, x) == {"norm": "on the example its output is read 2 times"}


def test_a_hook_of_a_block_keeps_what_it_sees_of_a_norm_at_its_end() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.act = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            z = self.act(self.block(x))
            return z if x.sum() < 1e9 else x

    stock, x = scrambled(Outer()), _input()
    assert fused(copy.deepcopy(stock), x) == {"block.1": "relu (as on the example)"}
    stock.block.register_forward_hook(lambda _module, _args, y: seen.append(y))
    model, seen = copy.deepcopy(stock), []
    assert not fused(model, x)
    seen.clear()
    for one in (model, stock):
        one(x)
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("place", ["relu", "bn1", "bn2"])
def test_a_hook_added_later_sees_the_values_of_the_original_forward(place: str) -> None:
    stock = scrambled(nets.Basic(4))
    model = copy.deepcopy(stock)
    batchnorm.fuse(model)
    seen: list[list[Tensor]] = []
    for one in (model, stock):
        mine: list[Tensor] = []
        one.get_submodule(place).register_forward_hook(lambda _m, _a, y, mine=mine: mine.append(y.clone()))
        one(_input())
        seen.append(mine)
        torch.manual_seed(0)
    assert [len(mine) for mine in seen] == ([2, 2] if place == "relu" else [1, 1])
    assert model.bn2.activation == "relu"  # restored after the original forward


def test_a_changed_attribute_restores_the_original_forward() -> None:
    class Scaled(nets.Basic):
        scale: float

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * self.scale)

    stock = scrambled(Scaled(4))
    stock.scale = 1.0
    model = copy.deepcopy(stock)
    assert fused(model) == {"bn1": "relu", "bn2": "add, relu"}
    for scale in (1.0, 2.0):
        stock.scale = model.scale = scale
        assert_alike(model, stock, _input())


def test_a_replaced_child_restores_the_original_forward() -> None:
    stock = scrambled(nets.Basic(4, nn.Sequential(nn.Conv2d(4, 4, 1))))
    model = copy.deepcopy(stock)
    batchnorm.fuse(model)
    for one in (stock, model):
        one.relu = nn.Tanh()
    assert_alike(model, stock, _input())
    new = scrambled(nn.BatchNorm2d(4))
    for one in (stock, model):
        one.bn2 = copy.deepcopy(new)
    assert_alike(model, stock, _input())


def test_a_longer_list_restores_the_original_forward() -> None:
    stock = scrambled(nets.Looping())
    model = copy.deepcopy(stock)
    batchnorm.fuse(model)
    for one in (stock, model):
        torch.manual_seed(3)
        one.convs.append(nn.Conv2d(4, 4, 1).double())
        one.norms.append(scrambled(nn.BatchNorm2d(4)))
    assert_alike(model, stock, _input())


class WithGelu(nn.Module):
    """A norm and an activation, in a forward that tests replace."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.norm(x))


def test_a_file_with_another_forward_of_the_class_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A file with a fused model is loaded after its code has changed."""
    model = scrambled(WithGelu())
    assert fused(model) == {"norm": "gelu"}
    file = pickle.dumps(model)
    monkeypatch.setattr(WithGelu, "forward", lambda self, x: F.silu(self.norm(x)))
    with pytest.raises(
        OptionError, match=r"forward of WithGelu is not the one that was fused \(silu follows"
    ):
        pickle.loads(file)(_input())


def test_an_activation_with_options_is_another_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WithGelu, "forward", lambda self, x: F.gelu(self.norm(x), approximate="tanh"))
    stock = scrambled(WithGelu())
    model = copy.deepcopy(stock)
    assert not fused(model)
    assert_alike(model, stock, _input())


def test_mixed_dtypes_and_numbers_added_in_place() -> None:
    """`y += residual` keeps the dtype of y; one pass would promote."""
    stock = nets.Basic(4)
    model = copy.deepcopy(stock)
    batchnorm.fuse(model)
    x = torch.randn(X)
    for one in (stock, model):
        one.conv2.register_forward_hook(lambda _m, _a, y: y.bfloat16())
        one.eval()
    y, expected = model(x), stock(x)
    assert y.dtype is expected.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected)


def test_copies_and_pickles_are_fused_too() -> None:
    """Pain row 11: averaged models are deep copies."""
    stock = scrambled(nets.resnet())
    model, x = copy.deepcopy(stock), _input(4, 3, 6, 6)
    batchnorm.fuse(model)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.optim.swa_utils.AveragedModel(model).module,
    ]
    for one in copies:
        assert isinstance(one[1], FusedForward)
        assert isinstance(one[1], nets.Basic)
        assert one[1].bn1 is not model[1].bn1
        assert_alike(one, stock, x)
        batchnorm.revert(one)
        assert type(one[1]) is nets.Basic
        assert_alike(one, stock, x)


def test_parameters_and_modules_stay_the_same_objects() -> None:
    model = nets.resnet()
    modules, tensors = list(model.modules()), [*model.parameters(), *model.buffers()]
    batchnorm.fuse(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True))
    assert type(model[1]).__name__ == "Basic"


def test_fewer_bytes_are_kept_for_the_backward() -> None:
    stock, kept = nets.resnet(), []
    model = copy.deepcopy(stock)
    batchnorm.fuse(model)
    for one in (model, stock):
        sizes: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            one(torch.randn(4, 3, 32, 32))
        kept.append(sum(sizes.values()))
    assert kept[0] < kept[1]


def test_fusing_twice_changes_nothing_more() -> None:
    stock = scrambled(nets.resnet())
    model = copy.deepcopy(stock)
    first = fused(model)
    assert first
    assert not fused(model)
    reasons = _reasons(model)
    assert all("itself" in reasons[name] or "already" in reasons[name] for name in first)
    assert_alike(model, stock, _input(4, 3, 6, 6))


def test_converted_layers_fuse_and_fused_models_convert() -> None:
    stock = scrambled(nets.resnet())
    model, x = copy.deepcopy(stock), _input(4, 3, 6, 6)
    batchnorm.convert(model)
    assert len(fused(model, x)) == 5
    other = copy.deepcopy(stock)
    batchnorm.convert(batchnorm.fuse(other), example=x)
    assert all(is_ours(other.get_submodule(row.name)) for row in batchnorm.inspect(other).rows)
    for one in (model, other):
        assert_alike(one, stock, x)


def test_row_1_and_row_11_calibrate_is_the_same_after_fusing() -> None:
    """Pain rows 1 and 11: calibration reads the inputs of norms, which fusing leaves as they are."""
    stock = scrambled(nets.resnet())
    model, data = copy.deepcopy(stock), _input(9, 3, 6, 6).split(3)
    batchnorm.fuse(model)
    reports = [batchnorm.calibrate(one, data) for one in (model, stock)]
    assert [layer.name for layer in reports[0].layers] == [layer.name for layer in reports[1].layers]
    assert_alike(model, stock, data[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_row_29_exported_and_compiled_models_compute_the_same() -> None:
    """Pain row 29: export keeps mode and eps; row 24: nothing is built for it."""
    model, x = nets.resnet(), torch.randn(4, 3, 6, 6)
    stock = copy.deepcopy(model)
    batchnorm.fuse(model)
    for one in (model, stock):
        one.eval()
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), stock(x))
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), stock(x))
    calls = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert any("batch_norm" in call for call in calls)


def test_row_9_two_forwards_before_a_backward() -> None:
    """Pain row 9: the GAN pattern; autograd holds no buffer that the second forward moves."""
    model = nets.resnet()
    batchnorm.fuse(model)
    loss = model(torch.randn(4, 3, 6, 6)).square().sum() + model(torch.randn(4, 3, 6, 6)).square().sum()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_checkpointing_a_fused_block() -> None:
    stock = scrambled(nets.Basic(4))
    model = copy.deepcopy(stock).eval()
    batchnorm.fuse(model)
    x = _input().requires_grad_()
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    cotangent = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, cotangent)
    (expected,) = torch.autograd.grad(stock.eval()(x), x, cotangent)
    torch.testing.assert_close(dx, expected)


def test_timms_layer_is_fused_with_its_own_activation(timm_norm: type[nn.Module]) -> None:  # noqa: F811
    stock = scrambled(nn.Sequential(timm_norm(4, nn.SiLU()), timm_norm(4), nn.ReLU()))
    model = copy.deepcopy(stock)
    assert fused(model) == {"0": "silu (inside it)", "1": "relu"}
    assert_alike(model, stock, _input())
    batchnorm.revert(model)
    assert [type(part) for part in model] == [timm_norm, timm_norm, nn.ReLU]


def test_a_subclass_is_left_not_refused() -> None:
    class Loud(nn.BatchNorm2d):
        pass

    model = nn.Sequential(Loud(4), nn.ReLU())
    assert "class is not known" in _reasons(batchnorm.fuse(model))["0"]
    assert type(model[0]) is Loud


def test_an_interruption_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.resnet()
    before = anatomy(model)

    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fuse_module, "fused_class", interrupted)
    with pytest.raises(KeyboardInterrupt):
        batchnorm.fuse(model)
    assert anatomy(model) == before


def test_a_wrong_fusion_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were a plan ever wrong, the comparison on the example would find it: here, relu instead of gelu."""
    monkeypatch.setattr(fuse_module, "module_activation", lambda _: "relu")
    message = refuses(batchnorm.fuse, nets.resnet(), torch.randn(4, 3, 6, 6))
    assert message.startswith(AgreementError.__name__)
    assert "fuse was taken back" in message


def test_a_change_in_training_only_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = batchnorm.BatchNorm2d.forward

    def twice(self: nn.Module, *args: Tensor) -> Tensor:
        if self.training:
            forward(self, *args)
        return forward(self, *args)

    monkeypatch.setattr(batchnorm.BatchNorm2d, "forward", twice)
    message = refuses(batchnorm.fuse, nets.resnet(), torch.randn(4, 3, 6, 6))
    assert "after training" in message


def test_a_fused_activation_shows_its_former_class() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Hardswish())
    batchnorm.fuse(model)
    assert isinstance(model[1], FusedActivation)
    assert "Hardswish, applied by the layer before it" in repr(model)


def test_what_holds_itself_is_searched_for_tensors_once_per_level() -> None:
    x, holder = torch.ones(1), []
    holder += [x, holder]
    found = recorded._tensors(holder)
    assert len(found) == 6
    assert all(tensor is x for tensor in found)
