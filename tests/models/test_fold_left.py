"""`fold` where it must not: nothing is folded wrongly, and the table says why a norm stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.folding.plan import Neighbour
from batchnorm.models.folding import plan as fold_plan
from batchnorm.models.verify import AgreementError

from .foldable import folded, ready, reasons
from .foreign import frozen_norm  # noqa: F401
from .nets import Branching, Looping, refuses


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


X = (2, 4, 6, 5)


class Block(nn.Module):
    """A convolution and a norm, called by `body`."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 4)
        self.kept: list[Tensor] = []
        self.body = body

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def two_readers(block: Any, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y) + y.relu()


def two_norms(block: Any, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y).relu() + block.other(y).tanh()


def shared_conv(block: Any, x: Tensor) -> Tensor:
    return block.other(block.conv(block.norm(block.conv(x)).relu()))


def conv_without_norm(block: Any, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) + block.conv(x.relu())


def norm_without_conv(block: Any, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) + block.norm(x.relu())


def in_place_before(block: Any, x: Tensor) -> Tensor:
    y = block.conv(x)
    y.add_(1)
    return block.norm(y)


def in_place_on_a_view(block: Any, x: Tensor) -> Tensor:
    y = block.conv(x)
    y[:, 1:].mul_(2)
    return block.norm(y)


def in_place_on_a_detached(block: Any, x: Tensor) -> Tensor:
    y = block.conv(x)
    y.detach().relu_()
    return block.norm(y)


def in_place_behind(block: Any, x: Tensor) -> Tensor:
    y = block.conv(x)
    z = block.norm(y)
    return y.mul_(z)


def activation_between(block: Any, x: Tensor) -> Tensor:
    return block.norm(F.relu(block.conv(x)))


def residual_between(block: Any, x: Tensor) -> Tensor:
    return block.norm(block.conv(x) + x)


def weight_read(block: Any, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) + F.conv2d(x.relu(), block.conv.weight, None, 1, 1)


def channels_cut(block: Any, x: Tensor) -> Tensor:
    return block.norm(torch.cat([block.conv(x)[:, 2:], x[:, 2:]], 1))


def other_axis(block: Any, x: Tensor) -> Tensor:
    """The linear layer's channels are the last axis, the norm's the second; both have four."""
    return block.norm(block.linear(x[..., :4]))


def output_too(block: Any, x: Tensor) -> Any:
    y = block.conv(x)
    return block.norm(y), y


def kept_in_an_attribute(block: Any, x: Tensor) -> Tensor:
    block.kept = [block.conv(x)]
    return block.norm(block.kept[0])


def read_by_numpy(block: Any, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y) * float(y.detach().numpy().sum())


def read_as_a_list(block: Any, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y) * y.tolist()[0][0][0][0]


def norm_read(block: Any, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) * block.norm.weight.sum()


def forward_past_the_call(block: Any, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) + block.norm.forward(x)


def conv_past_the_call(block: Any, x: Tensor) -> Tensor:
    return block.norm(block.conv(x)) + block.conv.forward(x.relu())


class Peeking(nn.Conv2d):
    """It reads a tensor that it was not given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.block.kept[0]


class Overwriting(nn.Conv2d):
    """It writes into a tensor that it was not given."""

    def forward(self, x: Tensor) -> Tensor:
        self.block.kept[0].relu_()
        return super().forward(x)


def _behind_its_back(block: Any, x: Tensor, kind: type[nn.Conv2d]) -> Tensor:
    if not hasattr(block, "late"):
        block.late = kind(4, 4, 1).double().eval()
        object.__setattr__(block.late, "block", block)
    y = block.conv(x)
    object.__setattr__(block, "kept", [y])
    z = block.late(x)
    object.__setattr__(block, "kept", [])
    return block.norm(y) + z


def read_inside_another_layer(block: Any, x: Tensor) -> Tensor:
    return _behind_its_back(block, x, Peeking)


def written_inside_another_layer(block: Any, x: Tensor) -> Tensor:
    return _behind_its_back(block, x, Overwriting)


def chosen_by_value(block: Any, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y) if y.mean() > 1e3 else block.norm(y) * 2


LEFT = {  # body -> of which norms a word of the reason is
    two_readers: {"norm": "read 2 times (relu)"},
    two_norms: {"norm": "read 2 times (other (BatchNorm2d))", "other": "read 2 times"},
    shared_conv: {
        "norm": "conv (Conv2d) is called 2 times, 1 of them",
        "other": "conv (Conv2d) is called 2 times",
    },
    conv_without_norm: {"norm": "is called 2 times, 1 of them"},
    norm_without_conv: {"norm": "before it is relu"},
    in_place_before: {"norm": "before it is add_"},
    in_place_on_a_view: {"norm": "before it is memory that is also another tensor's"},
    in_place_on_a_detached: {"norm": "before it is relu_"},
    in_place_behind: {"norm": "read 2 times (mul_)"},
    activation_between: {"norm": "before it is relu"},
    residual_between: {"norm": "before it is add"},
    weight_read: {"norm": "a weight that something else reads"},
    channels_cut: {"norm": "before it is cat"},
    other_axis: {"norm": "channels on another axis"},
    output_too: {"norm": "read 2 times (the model's output)"},
    kept_in_an_attribute: {"norm": "an attribute that keeps it"},
    read_by_numpy: {"norm": "read 2 times (numpy)"},
    read_as_a_list: {"norm": "read 2 times (tolist)"},
    norm_read: {"norm": "something else reads its parameters"},
    forward_past_the_call: {"norm": "something else reads its parameters"},
    conv_past_the_call: {"norm": "a weight that something else reads"},
    read_inside_another_layer: {"norm": "read 2 times (something in late"},
    written_inside_another_layer: {"norm": "before it is memory that is also another tensor's"},
    chosen_by_value: {"norm": "read 2 times (mean)"},
}


@pytest.mark.parametrize("body", LEFT, ids=lambda body: body.__name__)
def test_what_something_else_reads_is_left(body: Any) -> None:
    """Row 12: a convolution that is shared or read twice, in every way that a forward may do so."""
    model = ready(Block(body))
    x = torch.randn(X, dtype=torch.float64)
    model.eval()(x)  # some make a layer on their first call
    found = reasons(model, x)
    for name, words in LEFT[body].items():
        assert words in found[name], found
    copies = [batchnorm.fold(model, x)]
    if body not in (read_inside_another_layer, written_inside_another_layer):  # no graph shows what is inside
        copies.append(batchnorm.fold(model))
    for one in copies:
        assert_all_equal(model, one, x)
        assert_all_equal(model, one, torch.randn(3, 4, 7, 5, dtype=torch.float64))
        assert all(isinstance(getattr(one, name), nn.BatchNorm2d) for name in LEFT[body])


def assert_all_equal(model: nn.Module, copy: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        wanted, given = model.eval()(x), copy(x)
    torch.testing.assert_close(given, wanted, rtol=1e-10, atol=1e-10)


def norm_shared_by_convs(block: Any, x: Tensor) -> Tensor:
    """Exact: each layer takes the norm, which is called behind each and nowhere else."""
    return block.norm(block.conv(x)).relu() + block.norm(block.more(x)).tanh()


def test_a_norm_that_several_layers_feed_goes_into_each() -> None:
    """Row 12: several call sites."""
    model = Block(norm_shared_by_convs)
    model.more = nn.Conv2d(4, 4, 1)
    del model.other, model.linear
    x = torch.randn(X, dtype=torch.float64)
    folded(ready(model), x, x)
    assert batchnorm.inspect(model, x).rows[0].folds_into == "conv, more (before)"


def test_a_block_that_is_called_twice_folds() -> None:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = ready(nn.Sequential(inner, nn.ReLU(), inner))
    x = torch.randn(X, dtype=torch.float64)
    folded(model, x, x)
    folded(model, x)


class Heads(nn.Module):
    """RetinaNet's: one convolution for all levels, a norm for each. Its forward is a loop over the levels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, levels: list[Tensor]) -> Tensor:
        found = [norm(self.conv(x)).mean((2, 3)) for x, norm in zip(levels, self.norms, strict=True)]
        return torch.cat(found, 1)


def test_a_convolution_with_a_norm_for_each_call_takes_none() -> None:
    """Row 12: PT 104593, 197539."""
    model = ready(Heads())
    levels = [torch.randn(X, dtype=torch.float64), torch.randn(2, 4, 3, 3, dtype=torch.float64)]
    copy = batchnorm.fold(model, (levels,))
    assert_all_equal(model, copy, levels)  # type: ignore[arg-type]
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in copy.norms)
    assert all("conv (Conv2d) is called 2 times" in why for why in reasons(model, (levels,)).values())


class TwoPaths(nn.Module):
    """The other branch, which the example does not take, is a block that is a graph: it is read off that."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.a = nn.Sequential(self.conv, nn.BatchNorm2d(4))
        self.b = nn.Sequential(self.conv, nn.ReLU(), nn.BatchNorm2d(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.shape[-1] > 4 else self.b(x)


def test_a_branch_that_the_example_does_not_take_is_read() -> None:
    model = ready(TwoPaths())
    x = torch.randn(X, dtype=torch.float64)
    for example in (x, None):
        folded(model, x, example, left=2)
        assert_all_equal(model, batchnorm.fold(model, example), x[..., :3])


def _rescaled(norm: Any, x: Tensor) -> Tensor:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    shape = (1, -1, 1, 1)
    return x * scale.view(shape) + (norm.bias - norm.running_mean * scale).view(shape)


def test_a_norm_that_changes_the_dtype_stays(frozen_norm: Any, monkeypatch: Any) -> None:  # noqa: F811
    """Buffers of float32 behind a layer of bfloat16: what the norm returns is float32."""
    monkeypatch.setattr(frozen_norm, "forward", _rescaled)  # as torchvision's own
    model = nn.Sequential(nn.Conv2d(4, 4, 1).bfloat16(), ready(frozen_norm(4), torch.float32)).eval()
    x = torch.randn(X).bfloat16()
    assert model(x).dtype == torch.float32
    for example, words in ((x, "it turns torch.bfloat16"), (None, "computes in torch.bfloat16")):
        assert batchnorm.fold(model, example)(x).dtype == torch.float32
        assert words in reasons(model, example)["1"]


@pytest.mark.parametrize(("make", "norms"), [(Branching, 2), (Looping, 2)])
def test_control_flow_and_loops(make: Any, norms: int) -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 1), make()))
    x = torch.randn(X, dtype=torch.float64)
    is_branching = make is Branching  # it looks at its input, and its second norm is behind an activation
    folded(model, x, x, left=2 if is_branching else 0)
    folded(model, x, left=2 if is_branching else 0)
    assert len(batchnorm.inspect(model).rows) == norms
    if make is Branching:
        assert "pass example=" in reasons(model)["1.norm"]


@pytest.mark.parametrize("where", ["conv", "norm", "block"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_that_would_see_other_values(where: str, kind: str) -> None:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = ready(nn.Sequential(nn.Sequential(inner[0]), nn.Sequential(inner[1])))
    target = {"conv": inner[0], "norm": inner[1], "block": model[0]}[where]
    seen: list[Any] = []
    getattr(target, kind)(lambda *args: seen.append(args[-1]))
    x = torch.randn(X, dtype=torch.float64)
    before = where == "block" and kind == "register_forward_pre_hook"  # it sees the model's input only
    folded(model, x, x, left=not before)
    if not before:
        assert "hooks" in reasons(model, x)["1.0"]
    model[1](model[0](x))
    assert seen


def test_a_norm_that_is_kept_outside_of_the_modules_is_replaced_there_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.order = [self.conv, self.norm]

        def forward(self, x: Tensor) -> Tensor:
            for part in self.order:
                x = part(x)
            return x

    model = ready(Plain())
    x = torch.randn(X, dtype=torch.float64)
    folded(model, x, x)
    folded(model, x)


class Unknown(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def _norm(**settings: Any) -> nn.Module:
    return nn.BatchNorm2d(4, **settings)


def _infinite() -> nn.Module:
    norm = _norm()
    norm.running_var.fill_(-1)
    return norm


@pytest.mark.parametrize(
    ("norm", "words"),
    [
        (Unknown(4), "its class is not known"),
        (_norm(track_running_stats=False), "no running statistics"),
        (_norm(device="meta"), "no values"),
    ],
    ids=["subclass", "untracked", "meta"],
)
def test_norms_that_are_no_constant_map_stay(norm: nn.Module, words: str) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), norm)
    copy = batchnorm.fold(model)
    assert type(copy[1]) is type(norm)
    assert words in reasons(model)["1"]


def test_statistics_that_give_nan_stay() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), _infinite())
    assert isinstance(batchnorm.fold(model)[1], nn.BatchNorm2d)
    assert "NaN or inf" in reasons(model)["1"]


def test_without_an_example_the_number_of_axes_is_checked() -> None:
    """A linear layer's channels are the last axis, those of a BatchNorm1d the second: one with two axes."""
    model = ready(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    copy = folded(model, torch.randn(3, 4, dtype=torch.float64))
    sequence = torch.randn(3, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="folded for an input of 2 axes, got 3"):
        copy(sequence)
    folded(model, sequence, sequence, left=1)


def test_a_wrong_plan_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 12: the copy's outputs are compared in float64, tightly: a model of float32 has no slack for it."""
    model = ready(Block(two_readers), torch.float32)
    x = torch.randn(X)
    monkeypatch.setattr(fold_plan, "_read_elsewhere", lambda *_: "")
    assert "fold was taken back" in refuses(batchnorm.fold, model, x)


def amplifying(block: Any, x: Tensor) -> Tensor:
    """A rounding of float32 turns into another output altogether."""
    return (block.norm(block.conv(x)) * 1e6).sin()


def of_float32_only(block: Any, x: Tensor) -> Tensor:
    y = block.conv(x)
    return block.norm(y + torch.zeros(1, dtype=torch.float32).view(y.dtype)) + y.relu()


def test_rounding_in_float32_refuses_nothing() -> None:
    model = ready(Block(amplifying), torch.float32)
    x = torch.randn(X)
    copy = batchnorm.fold(model, x)
    assert isinstance(copy.norm, nn.Identity)
    with torch.no_grad():
        assert (copy(x) - model.eval()(x)).abs().max() > 0.01  # or else this tests nothing


def test_a_model_of_float32_only_is_compared_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ready(Block(of_float32_only), torch.float32)
    x = torch.randn(X)
    assert isinstance(batchnorm.fold(model, x).norm, nn.BatchNorm2d)
    monkeypatch.setattr(fold_plan, "_read_elsewhere", lambda *_: "")
    monkeypatch.setattr(fold_plan.TorchPlanner, "_sources", _the_conv)
    assert "fold was taken back" in refuses(batchnorm.fold, model, x)


def _the_conv(planner: Any, *_: Any) -> list[Neighbour[nn.Module]]:
    conv = next(calls[0] for module, calls in planner.calls.items() if type(module) is nn.Conv2d)
    return [Neighbour(conv, "before", conv.gives[0], conv, 1)]


def test_weights_that_are_too_large_are_refused() -> None:
    model = ready(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), torch.float16)
    model[1].running_var.fill_(1e-4)
    model[0].weight.data.fill_(6e4)
    with pytest.raises(AgreementError, match="too large"):
        batchnorm.fold(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_cannot_be_copied_is_refused() -> None:
    class Stubborn(nn.Module):
        def __deepcopy__(self, memo: Any) -> Any:
            raise RuntimeError("one of a kind")

    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), Stubborn())
    with pytest.raises(OptionError, match="one of a kind"):
        batchnorm.fold(model)
    assert "one of a kind" in reasons(model)["1"]
    with pytest.raises(OptionError, match="not initialized"):
        batchnorm.fold(nn.Sequential(nn.LazyConv2d(4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(OptionError, match="scripted"):
        batchnorm.fold(torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))))
    with pytest.raises(OptionError, match=r"before torch\.compile"):
        batchnorm.fold(torch.compile(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))))


def test_functional_norms_are_left() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)
            self.register_buffer("mean", torch.randn(4))
            self.register_buffer("var", torch.rand(4) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), self.mean, self.var)

    model = ready(Functional())
    x = torch.randn(X, dtype=torch.float64)
    folded(model, x, x)


class TwoRanks(nn.Module):
    """A norm that takes inputs of any rank, behind convolutions of sequences and of images."""

    def __init__(self) -> None:
        super().__init__()
        self.of_sequences, self.of_images = nn.Conv1d(4, 3, 1), nn.Conv2d(4, 3, 1)
        self.norm = nn.SyncBatchNorm(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(self.of_sequences(x.flatten(2))), self.norm(self.of_images(x))


def test_what_is_left_checks_the_rank_so_a_norm_for_two_ranks_stays() -> None:
    """Without an example, where nothing else tells whether an input has a batch axis."""
    model, x = ready(TwoRanks()), torch.randn(X, dtype=torch.float64)
    assert reasons(model)["norm"].startswith("before it are layers for inputs of several ranks; after it")
    for one in (batchnorm.fold(model), batchnorm.fold(model, x)):
        for found, wanted in zip(one(x), model.eval()(x), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
