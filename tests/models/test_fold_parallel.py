"""Row 61: `fold` makes one convolution of those that read the same and are added, after their norms."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import batchnorm

from .foldable import assert_equal, folded, homes, ready
from .test_fold_joined import RepVGG

C = nn.Conv2d
SIZES = {1: (2, 4, 11), 2: (2, 4, 9, 8), 3: (2, 4, 5, 6, 4)}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Parallel(nn.Module):
    """Convolutions of one input, each with a norm; `join` puts their outputs together."""

    def __init__(self, convs: list[Any], join: Callable[..., Tensor]) -> None:
        super().__init__()
        norms = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
        self.branches = nn.ModuleList(
            nn.Sequential(conv, norms[len(conv.kernel_size)](conv.out_channels)) for conv in convs
        )
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def total(m: Parallel, x: Tensor) -> Tensor:
    first, *others = (branch(x) for branch in m.branches)
    for y in others:
        first = first + y
    return first.relu()


def in_place(m: Parallel, x: Tensor) -> Tensor:
    y = m.branches[0](x)
    for branch in m.branches[1:]:
        y += branch(x)
    return y.sigmoid()


def reversed_in_place(m: Parallel, x: Tensor) -> Tensor:
    """The sum is written over the output of the last one, which is mostly a smaller one."""
    y = m.branches[-1](x)
    for branch in m.branches[:-1]:
        y += branch(x)
    return y.sigmoid()


def difference(m: Parallel, x: Tensor) -> Tensor:
    y = m.branches[-1](x)
    for branch in m.branches[:-1]:
        y = branch(x) - y
    return y.tanh()


def convolutions(model: nn.Module) -> int:
    return sum(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


FIT: dict[str, Callable[[], list[Any]]] = {
    "3×3 and 1×1": lambda: [C(4, 6, 3, padding=1), C(4, 6, 1)],
    "with a stride": lambda: [C(4, 6, 3, 2, 1), C(4, 6, 1, 2)],
    "without a bias": lambda: [C(4, 6, 3, padding=1, bias=False), C(4, 6, 1, bias=False)],
    "5×5 and 3×3": lambda: [C(4, 6, 5, padding=2), C(4, 6, 3, padding=1)],
    "5×5 and 3×3, strides": lambda: [C(4, 6, 5, (2, 3), 2), C(4, 6, 3, (2, 3), 1)],
    "grouped": lambda: [C(4, 6, 3, padding=1, groups=2), C(4, 6, 1, groups=2)],
    "depthwise": lambda: [C(4, 4, 3, padding=1, groups=4), C(4, 4, 1, groups=4)],
    "dilated": lambda: [C(4, 6, 3, padding=2, dilation=2), C(4, 6, 1)],
    "both dilated": lambda: [C(4, 6, 5, padding=4, dilation=2), C(4, 6, 3, padding=2, dilation=2)],
    "a row": lambda: [C(4, 6, 3, padding=1), C(4, 6, (1, 3), padding=(0, 1))],
    "a row and a column": lambda: [
        C(4, 6, 3, padding=1),
        C(4, 6, (3, 1), padding=(1, 0)),
        C(4, 6, (1, 3), padding=(0, 1)),
    ],
    "equal ones": lambda: [C(4, 6, 3, padding=1) for _ in range(4)],
    "the larger one last": lambda: [C(4, 6, 1), C(4, 6, 3, padding=1), C(4, 6, 5, padding=2)],
    "same and by number": lambda: [C(4, 6, 3, padding="same"), C(4, 6, 1)],
    "even, same": lambda: [C(4, 6, 4, padding="same"), C(4, 6, 2, padding="same")],
    "valid and wide": lambda: [C(4, 6, 5, padding=1), C(4, 6, 3, padding="valid")],
    "reflected": lambda: [C(4, 6, size, padding=size // 2, padding_mode="reflect") for size in (5, 3)],
    "circular, and one without padding": lambda: [C(4, 6, 3, padding=1, padding_mode="circular"), C(4, 6, 1)],
    "normalized weights": lambda: [weight_norm(C(4, 6, 3, padding=1)), weight_norm(C(4, 6, 1))],
    "sequences": lambda: [nn.Conv1d(4, 6, 5, 2, 2), nn.Conv1d(4, 6, 1, 2)],
    "volumes": lambda: [nn.Conv3d(4, 6, 3, padding=1), nn.Conv3d(4, 6, (1, 3, 1), padding=(0, 1, 0))],
}  # fmt: skip

JOINS = (total, in_place, reversed_in_place, difference)
JOINED = [(case, JOINS[number % 4]) for number, case in enumerate(FIT)]  # each in one way
JOINED += [("with a stride", join) for join in JOINS]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("case", "join"), JOINED)
def test_row_61_one_convolution_is_left(case: str, join: Callable[..., Tensor]) -> None:
    """Row 61: exact in float64, on inputs of another size and layout than the example's too."""
    convs = FIT[case]()
    model = ready(Parallel(convs, join))
    axes = len(convs[0].kernel_size)
    x = torch.randn(SIZES[axes], dtype=torch.float64)
    twin = folded(model, x, x)
    assert convolutions(twin) == 1
    larger = torch.randn(3, 4, *(size + 3 for size in SIZES[axes][2:]), dtype=torch.float64)
    assert_equal(model, twin, larger)
    assert_equal(model, twin, larger.movedim(1, -1).contiguous().movedim(-1, 1))


LEFT: dict[str, Callable[[], list[Any]]] = {
    "a row and a column": lambda: [C(4, 6, (1, 3), padding=(0, 1)), C(4, 6, (3, 1), padding=(1, 0))],
    "other groups": lambda: [C(4, 4, 3, padding=1, groups=4), C(4, 4, 1)],
    "other dilations": lambda: [C(4, 6, 3, 3), C(4, 6, 3, 3, dilation=2)],
    "other paddings": lambda: [C(4, 6, 3, padding=1), C(4, 6, 3, padding=1, padding_mode="reflect")],
    "even": lambda: [C(4, 6, 2, 2, 0), C(4, 6, 1, 2, 0)],
    "not in the middle": lambda: [C(4, 6, 3, 3, 0), C(4, 6, 1, 3, 0)],
    "other strides": lambda: [C(4, 6, 9, (1, 8), 4), C(4, 6, 1, (1, 9), 0)],
    "transposed": lambda: [nn.ConvTranspose2d(4, 6, 3, padding=1), C(4, 6, 1)],
}


@pytest.mark.parametrize("case", LEFT)
def test_those_that_do_not_fit_stay_apart(case: str) -> None:
    """Their outputs have one shape, on the example at least; the norms go into each."""
    size = {"even": 8, "other dilations": 11}.get(case, 9)
    model, x = ready(Parallel(LEFT[case](), total)), torch.randn(2, 4, size, size, dtype=torch.float64)
    assert convolutions(folded(model, x, x)) == 2


def of_another_input(m: Parallel, x: Tensor) -> Tensor:
    return m.branches[0](x) + m.branches[1](x.tanh())


def read_elsewhere(m: Parallel, x: Tensor) -> Tensor:
    y = m.branches[0](x)
    return y + m.branches[1](x) + y.mean()


def the_larger_read_elsewhere(m: Parallel, x: Tensor) -> Tensor:
    y = m.branches[1](x)
    return y + m.branches[0](x) + y.mean()


def called_again(m: Parallel, x: Tensor) -> Tensor:
    return m.branches[0](x) + m.branches[1](x) + m.branches[1](x.tanh()).mean()


def multiplied(m: Parallel, x: Tensor) -> Tensor:
    return m.branches[0](x) * m.branches[1](x)


def scaled(m: Parallel, x: Tensor) -> Tensor:
    return torch.add(m.branches[0](x), m.branches[1](x), alpha=2)


def weight_read(m: Parallel, x: Tensor) -> Tensor:
    return m.branches[0](x) + m.branches[1](x) + m.branches[1][0].weight.mean()


KEPT = [
    of_another_input,
    read_elsewhere,
    the_larger_read_elsewhere,
    called_again,
    multiplied,
    scaled,
    weight_read,
]


@pytest.mark.parametrize("join", KEPT)
def test_what_something_else_needs_stays(join: Callable[..., Tensor]) -> None:
    model = ready(Parallel([C(4, 6, 3, padding=1), C(4, 6, 1)], join))
    x = torch.randn(SIZES[2], dtype=torch.float64)
    twin = batchnorm.fold(model, x)
    assert convolutions(twin) == 2
    assert_equal(model, twin, x)


def test_a_hook_keeps_a_convolution() -> None:
    model = ready(Parallel([C(4, 6, 3, padding=1), C(4, 6, 1)], total))
    x = torch.randn(SIZES[2], dtype=torch.float64)
    for number in (0, 1):
        one = copy.deepcopy(model)
        one.branches[number][0].register_forward_hook(lambda *_: None)
        assert convolutions(batchnorm.fold(one, x)) == 2


def test_row_61_a_block_of_repvgg_is_one_convolution() -> None:
    """Row 61: with its identity; the copy is pickled, exported and folded again as any other."""
    model = ready(nn.Sequential(RepVGG(4), RepVGG(4)), torch.float32)
    x = torch.randn(SIZES[2])
    twin = folded(model, x, x, tolerance=1e-5)
    assert convolutions(twin) == 2
    assert len(twin.state_dict()) == 4
    assert_equal(twin, pickle.loads(pickle.dumps(twin)), x, 0.0)
    assert_equal(twin, batchnorm.fold(twin, x), x, 0.0)
    samples = torch.export.Dim("samples", min=2)
    program = torch.export.export(twin, (x,), dynamic_shapes=[{0: samples}]).module()
    other = torch.randn(5, 4, 9, 8)
    torch.testing.assert_close(program(other), twin(other), rtol=1e-6, atol=1e-6)


def test_inspect_says_which_convolution_a_branch_becomes_part_of() -> None:
    """Of a chain (1×1 into 3×3 into 5×5) the last one, and of no merge the convolution alone."""
    model = ready(Parallel([C(4, 6, size, padding=size // 2) for size in (1, 3, 5)], total))
    x = torch.randn(SIZES[2], dtype=torch.float64)
    assert homes(model, x) == {
        "branches.0.1": "branches.0.0 within branches.2.0 (before)",
        "branches.1.1": "branches.1.0 within branches.2.0 (before)",
        "branches.2.1": "branches.2.0 (before)",
    }
    assert homes(model)["branches.0.1"] == "branches.0.0 (before)"
    assert convolutions(folded(model, x, x)) == 1


@pytest.mark.parametrize("join", [total, in_place])
def test_the_zeros_of_a_branch_are_one_number_unless_the_sum_is_written_over_them(join: Any) -> None:
    """Which reads and writes no memory of an image's size."""
    model = ready(Parallel([C(4, 6, 1), C(4, 6, 3, padding=1)], join))
    x = torch.randn(SIZES[2], dtype=torch.float64)
    zeros = folded(model, x, x).branches[0][0](x)
    assert zeros.shape == (2, 6, 9, 8)
    assert (zeros.untyped_storage().nbytes() == zeros.element_size()) == (join is total)


def test_without_an_example_they_stay_apart() -> None:
    model = ready(Parallel([C(4, 6, 3, padding=1), C(4, 6, 1)], total))
    x = torch.randn(SIZES[2], dtype=torch.float64)
    assert convolutions(folded(model, x)) == 2
