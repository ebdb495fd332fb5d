"""`torch.fx` and torch.ao.quantization: our layers are nodes as stock ones are, or `revert` is named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.fx.experimental.proxy_tensor import make_fx

import batchnorm
from batchnorm import functional
from batchnorm.errors import InputTypeError, OptionError
from tests.torch.twins import assert_identical, scramble, state

OPTIONS: list[dict[str, Any]] = [
    {},
    {"activation": "elu"},
    {"statistics": batchnorm.Ghost(2)},
    {"statistics": batchnorm.Renorm()},
    {"statistics": batchnorm.Running()},
    {"statistics": batchnorm.Adapted(4)},
    {"statistics": batchnorm.Synced()},
    {"nonfinite": "skip"},
    {"nonfinite": "raise"},
    {"small_batch": "running"},
    {"momentum": None},
    {"domains": 2},
    {"domains": 2, "domain_affine": True},
    {"track_running_stats": False},
]
REVERT = r"torch\.ao\.quantization takes torch's own layers only: call batchnorm\.revert\(model\) first"


class Block(nn.Module):
    """Convolution, norm, addition, activation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = norm
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.convolution(x)) + x)


def images(seed: int) -> Tensor:
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def nodes(traced: torch.fx.GraphModule) -> list[tuple[str, str]]:
    return [(node.op, str(node.target)) for node in traced.graph.nodes]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_row_71_a_layer_is_one_node(options: dict[str, Any], training: bool) -> None:
    """Row 71: the graph is that of the stock model, and its layer the same module: outputs, statistics."""
    model = Block(scramble(batchnorm.BatchNorm2d(3, **options))).train(training)
    eager = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    assert nodes(traced) == nodes(torch.fx.symbolic_trace(Block(nn.BatchNorm2d(3))))
    assert_identical(state(model), state(eager))  # tracing moves nothing
    assert traced.norm is model.norm
    assert torch.equal(traced(images(0)), eager(images(0)))
    assert_identical(state(model), state(eager))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("BatchNorm1d", (4, 3)), ("BatchNorm3d", (2, 3, 2, 2, 2)), ("SyncBatchNorm", (4, 3, 2))],
)
def test_every_kind_of_layer_is_one_node(kind: str, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(scramble(getattr(batchnorm, kind)(3)))
    x = torch.randn(shape)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), copy.deepcopy(model)(x))


def test_masks_lengths_and_residuals_are_arguments_of_the_node() -> None:
    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = scramble(batchnorm.BatchNorm1d(3))

        def forward(self, x: Tensor, residual: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
            return self.norm(x, residual, mask=mask) + self.norm(x, lengths=lengths)

    model = Called().eval()
    arguments = (torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(2, 4) > 0.4, torch.tensor([1, 4]))
    assert torch.equal(torch.fx.symbolic_trace(model)(*arguments), model(*arguments))


def test_hooks_run_when_the_node_does_and_once() -> None:
    model = Block(scramble(batchnorm.BatchNorm2d(3)))
    seen: list[Any] = []
    model.norm.register_forward_pre_hook(lambda _, inputs: (inputs[0] + 1,))
    model.norm.register_forward_hook(lambda _, inputs, y: seen.append(inputs) or y * 2)
    eager = copy.deepcopy(model)
    traced = torch.fx.symbolic_trace(model)
    assert seen == []
    assert torch.equal(traced(images(0)), eager(images(0)))


def test_a_lazy_layer_is_one_node_too() -> None:
    model = batchnorm.convert(Block(nn.LazyBatchNorm2d()))
    traced = torch.fx.symbolic_trace(model)
    assert nodes(traced) == nodes(torch.fx.symbolic_trace(Block(nn.BatchNorm2d(3))))
    assert traced(images(0)).shape == (4, 3, 5, 5)
    assert type(traced.norm) is batchnorm.BatchNorm2d


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_fused_model_is_traced_as_it_runs(training: bool) -> None:
    model = batchnorm.fuse(batchnorm.convert(Block(scramble(nn.BatchNorm2d(3))))).train(training)
    traced = torch.fx.symbolic_trace(model)
    assert ("call_module", "activation") not in nodes(traced)
    assert torch.equal(traced(images(0)), copy.deepcopy(model)(images(0)))


def test_a_fused_block_that_has_changed_since_is_refused() -> None:
    """The author's forward runs there, in which the layer applies no activation: a graph's layer would."""
    model = batchnorm.fuse(batchnorm.convert(nn.Sequential(Block(nn.BatchNorm2d(3)))))
    model[0].activation.register_forward_hook(lambda *_: None)
    with pytest.raises(OptionError, match=r"Block with norm: .*batchnorm\.revert"):
        torch.fx.symbolic_trace(model)
    batchnorm.revert(model)
    assert torch.equal(torch.fx.symbolic_trace(model)(images(0)), copy.deepcopy(model)(images(0)))


def test_a_folded_model_is_traced() -> None:
    model = nn.Sequential(nn.Linear(3, 4), scramble(nn.BatchNorm1d(4)), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    folded = batchnorm.fold(model, x)
    assert torch.equal(torch.fx.symbolic_trace(folded)(x), folded(x))


def test_a_layer_by_itself_says_what_to_trace() -> None:
    """Stock torch fails there too."""
    with pytest.raises(OptionError, match=r"BatchNorm2d: .*torch\.nn\.Sequential\(layer\)"):
        torch.fx.symbolic_trace(batchnorm.BatchNorm2d(3))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: functional.batch_norm(x, None, None, training=True, statistics=batchnorm.Ghost(2)),
        lambda x: functional.pure_batch_norm(x, None, None, training=True, activation="relu")[0],
        lambda x: functional.normalize_batch(x, statistics=batchnorm.Ghost(2))[0],
        lambda x: functional.moments(x).mean,
    ],
    ids=["batch_norm", "pure_batch_norm", "normalize_batch", "moments"],
)
def test_functions_are_nodes(call: Callable[[Tensor], Tensor]) -> None:
    traced = torch.fx.symbolic_trace(call)
    assert torch.equal(traced(images(0)), call(images(0)))
    assert torch.equal(traced(images(1)), call(images(1)))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, on import
def test_fx_fuse_leaves_our_layers_right() -> None:
    from torch.fx.experimental import optimization

    model = Block(scramble(batchnorm.BatchNorm2d(3))).eval()
    torch.testing.assert_close(optimization.fuse(model)(images(0)), model(images(0)))
    torch.testing.assert_close(quantize_fx.fuse_fx(model)(images(0)), model(images(0)))


QUANTIZING = {
    "prepare_fx": lambda m: quantize_fx.prepare_fx(
        m.eval(), quantization.get_default_qconfig_mapping(), (images(0),)
    ),
    "prepare_qat_fx": lambda m: quantize_fx.prepare_qat_fx(
        m.train(), quantization.get_default_qat_qconfig_mapping(), (images(0),)
    ),
    "fuse_modules": lambda m: quantization.fuse_modules(m.eval(), [["convolution", "norm"]]),
    "fuse_modules_qat": lambda m: quantization.fuse_modules_qat(m.train(), [["convolution", "norm"]]),
}


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min:UserWarning")
@pytest.mark.parametrize("flow", QUANTIZING)
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
def test_row_71_quantization_names_revert_which_helps(flow: str, options: dict[str, Any]) -> None:
    """Row 71: one line, that changes nothing; and behind `revert` it runs as with the stock model."""
    model = Block(scramble(batchnorm.BatchNorm2d(3, **options)))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(OptionError, match=REVERT) as raised:
        QUANTIZING[flow](model)
    assert "BatchNorm2d" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert_identical(dict(model.state_dict()), dict(before))
    batchnorm.revert(model)
    if options:  # the activation is a module of its own then
        assert type(model.norm.norm) is nn.BatchNorm2d
        return
    assert QUANTIZING[flow](model)(images(0)).shape == (4, 3, 5, 5)


def test_every_fuser_of_a_stock_norm_refuses_ours() -> None:
    from torch.ao.quantization import fuser_method_mappings

    table = fuser_method_mappings._DEFAULT_OP_LIST_TO_FUSER_METHOD
    stock = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    patterns = [kinds for kinds in table if set(kinds) & set(stock)]
    assert len(patterns) >= 12
    for kinds in patterns:
        (norm,) = set(kinds) & set(stock)
        for ours in (getattr(batchnorm, norm.__name__), batchnorm.SyncBatchNorm):
            found = fuser_method_mappings.get_fuser_method(tuple(ours if k is norm else k for k in kinds))
            with pytest.raises(OptionError, match=REVERT):
                found(False, nn.Identity())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantized_input_names_revert() -> None:
    x = torch.quantize_per_tensor(images(0), 0.1, 10, torch.quint8)
    with pytest.raises(InputTypeError, match=rf"BatchNorm2d: the input is quantized, quint8; {REVERT}"):
        batchnorm.BatchNorm2d(3).eval()(x)


def call(model: nn.Module, x: Tensor, _second: Tensor) -> Tensor:
    return model(x)


def call_with_a_mask(model: nn.Module, x: Tensor, second: Tensor) -> Tensor:
    return model(x, mask=second[:, 0] > 0)


def call_with_a_residual(model: nn.Module, x: Tensor, second: Tensor) -> Tensor:
    return model(x, second)


def gradients(model: nn.Module, x: Tensor, second: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(model(x), [x, model.weight, model.bias], second)]
    )


@pytest.mark.one_in(3)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("options", "how"),
    [(options, how) for options in OPTIONS for how in (call_with_a_mask, gradients)]
    + [(options, how) for options in OPTIONS[:3] for how in (call, call_with_a_residual)],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_make_fx_records_operators_and_no_numbers(
    options: dict[str, Any], how: Callable[..., Tensor], training: bool
) -> None:
    """Kernels are no operators: a graph had what they computed from its example as constants, silently."""
    model = scramble(batchnorm.BatchNorm2d(3, **options)).train(training)
    before = copy.deepcopy(model.state_dict())
    if training and options.get("nonfinite") == "raise":
        with pytest.raises(OptionError, match=r'nonfinite="raise" cannot be exported in training'):
            make_fx(lambda x, second: how(model, x, second))(images(0), images(1))
        return
    graph = make_fx(lambda x, second: how(model, x, second))(images(0), images(1))
    model.load_state_dict(before)
    eager = copy.deepcopy(model)
    scramble(model)  # what the graph reads is the model's state, not that of its example
    eager.load_state_dict(model.state_dict())
    found, wanted = graph(images(2), images(3)), how(eager, images(2), images(3))
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=1e-5, atol=1e-5)
