"""Inputs that are no dense floating tensors: an error names what helps; MKL-DNN's work as in stock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm import kernels
from batchnorm.errors import ArgumentTypeError, InputTypeError
from tests.torch.twins import assert_identical, assert_same, scramble, state, twins

SEQUENCES = [(2, 3), (4, 3), (1, 3)]


def nested(layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([torch.randn(size) for size in SEQUENCES], layout=layout)


ODD: dict[str, tuple[Callable[[], Any], str]] = {
    "jagged": (lambda: nested(torch.jagged), r"nested tensor \(torch\.jagged\).*\.values\(\).*lengths="),
    "nested": (lambda: nested(torch.strided), r"nested tensor.*to_padded_tensor.*lengths="),
    "coo": (lambda: torch.randn(4, 3).to_sparse(), r"sparse tensor \(torch\.sparse_coo\).*\.to_dense\(\)"),
    "csr": (lambda: torch.randn(4, 3).to_sparse_csr(), r"sparse tensor \(torch\.sparse_csr\)"),
    "complex": (lambda: torch.randn(4, 3, dtype=torch.complex64), r"complex64: normalize \.real and \.imag"),
    "integer": (lambda: torch.ones(4, 3, dtype=torch.long), r"int64: convert it with \.float\(\)"),
    "bool": (lambda: torch.ones(4, 3, dtype=torch.bool), r"bool: convert it with \.float\(\)"),
    "a list": (lambda: [1.0, 2.0], "expected a tensor, got a list"),
    "an array": (lambda: torch.randn(4, 3).numpy(), "got a ndarray: torch.as_tensor|got an ndarray: torch"),
    "None": (lambda: None, "expected a tensor, got None"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR:UserWarning", "ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_odd_inputs_are_refused_with_a_remedy(name: str, training: bool) -> None:
    make, message = ODD[name]
    layer = nn.Sequential(scramble(batchnorm.BatchNorm1d(3))).train(training)
    before = state(layer)
    with pytest.raises(InputTypeError, match=rf"^0 \(BatchNorm1d\): .*{message}"):
        layer(make())
    assert_identical(state(layer), before)
    functions = batchnorm.functional
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(InputTypeError, match=message):
        functions.batch_norm(make(), mean, var, training=training)
    for function in (functions.moments, functions.normalize_batch):
        with pytest.raises(InputTypeError, match=message):
            function(make())
    with pytest.raises(InputTypeError, match=message):
        functions.pure_batch_norm(make(), mean, var, training=training)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "nested"])
def test_the_remedies_for_nested_tensors_agree(layout: torch.layout) -> None:
    """The values alone, and the padded sequences with their lengths, have the same statistics."""
    x = nested(layout)
    padded = torch.nested.to_padded_tensor(x, 7.0).movedim(1, 2)
    lengths = torch.tensor([size[0] for size in SEQUENCES])
    by_values, by_lengths = batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3)
    values = x.values() if layout is torch.jagged else torch.cat(x.unbind())
    y, z = by_values(values), by_lengths(padded, lengths=lengths)
    parts = [z[n, :, :length].T for n, length in enumerate(lengths)]
    torch.testing.assert_close(torch.cat(parts), y, rtol=1e-6, atol=1e-6)
    assert_same(state(by_lengths), state(by_values), tolerance=(1e-6, 1e-6))


def test_the_remedies_for_complex_and_quantized_inputs() -> None:
    x = torch.randn(8, 3, dtype=torch.complex64)
    real, imag = batchnorm.BatchNorm1d(3), batchnorm.BatchNorm1d(3)
    y = torch.complex(real(x.real), imag(x.imag))
    both = batchnorm.BatchNorm1d(6)(torch.view_as_real(x).flatten(1))
    torch.testing.assert_close(torch.view_as_real(y).flatten(1), both, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 3, 2, 3, 3)], ids=["2d", "3d"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [None, "dense", "mkldnn"])
def test_mkldnn_inputs_as_in_stock(shape: tuple[int, ...], training: bool, residual: str | None) -> None:
    stock, ours = (layer.train(training) for layer in twins(f"BatchNorm{len(shape) - 2}d", 3))
    x, r, dy = torch.randn(shape) * 2 + 1, torch.randn(shape), torch.randn(shape)
    found = []
    for layer, given in ((ours, x.clone().requires_grad_()), (stock, x.clone().requires_grad_())):
        added = None if residual is None else (r if residual == "dense" else r.to_mkldnn())
        if layer is stock:  # it takes MKL-DNN's 5-D inputs in evaluation only
            y = layer(given) if residual is None else layer(given) + r
        else:
            y = layer(given.to_mkldnn(), added)
            assert y.layout is torch._mkldnn
            y = y.to_dense()
        y.backward(dy)
        gradients = {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
        found.append({"y": y.detach(), "dx": given.grad, **gradients, **state(layer)})
    assert_same(*found, tolerance=(5e-6, 5e-6))
    if len(shape) == 4:
        torch.testing.assert_close(ours(x.to_mkldnn()).to_dense(), stock(x.to_mkldnn()).to_dense())


def test_explain_takes_a_layer_and_a_model() -> None:
    layer = batchnorm.BatchNorm1d(3)
    assert (
        kernels.explain(layer) == "cpu for BatchNorm1d, float32 inputs on cpu: Numba kernels, at every size"
    )
    assert "bfloat16 inputs on cpu" in kernels.explain(nn.Sequential(layer).bfloat16())
    assert kernels.explain(layer.to("meta")).startswith("eager for BatchNorm1d, bfloat16 inputs on meta")
    assert "float32" in kernels.explain(batchnorm.BatchNorm1d(3, affine=False, track_running_stats=False))
    with kernels.use("eager"):
        assert kernels.explain(layer).startswith("eager")
    for wrong in (3, "x", [layer], nn.BatchNorm1d):
        with pytest.raises(ArgumentTypeError, match="takes a tensor, or a layer of torch; got"):
            kernels.explain(wrong)
