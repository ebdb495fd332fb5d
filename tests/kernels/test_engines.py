"""Every engine, every primitive, every case of the grid, against the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from batchnorm.kernels import choose, eager
from batchnorm.kernels.interface import Coefficients, Moments
from batchnorm.statistics.moments import PooledMoments
from batchnorm.statistics.policy import by_batch, gradient_coefficients
from tests.support.cases import CASES, Case, Inputs
from tests.support.compare import Results, assert_close, case_results, reference_results
from tests.support.interpreted import GPU, device, every_engine_and_case, trimmed
from tests.support.primitives import Primitives

EPS = 1e-5
NAMES = ("eager", "cpu", *GPU)
every_engine = pytest.mark.parametrize("name", NAMES)


def _options(case: Case, inputs: Inputs) -> dict[str, object]:
    return {"residual": inputs.residual, "mask": inputs.mask, **case.options}


def _coefficients(inputs: Inputs, moments: Moments, sums: tuple[Tensor, Tensor]) -> Coefficients:
    weight = 1.0 if inputs.weight is None else inputs.weight.double()
    found = PooledMoments(moments.count.unsqueeze(1), moments.mean, moments.m2)
    return gradient_coefficients(weight, by_batch(found, EPS, torch), found, *sums)


def _assert_gradients(
    case: Case, expected: Results, dx: Tensor, dweight: Tensor, dbias: Tensor, dresidual: Tensor | None
) -> None:
    assert_close(dx, expected.dx, dtype=case.dtype, scale=expected.std, what="dx")
    assert_close(dweight, expected.dweight, dtype=torch.float32, what="dweight")
    assert_close(dbias, expected.dbias, dtype=torch.float32, what="dbias")
    if expected.dresidual is not None:
        assert_close(dresidual, expected.dresidual, dtype=case.dtype, what="dresidual")


@pytest.mark.one_in(5)
@pytest.mark.usefixtures("chunks")
@every_engine_and_case(NAMES, CASES)
def test_split_primitives(name: str, case: Case) -> None:
    """Pain rows 17 and 27: an offset of 1e6 standard deviations costs no accuracy, in no layout."""
    case = trimmed(name, case)
    engine, inputs = Primitives(choose.load(name)), case.make(device=device(name))
    x, weight, bias, _, dy, mask = inputs
    expected = case_results(case, eps=EPS)
    options = _options(case, inputs)

    count, mean, m2 = found = engine.moments(x, mask=mask, group_size=case.group_size)
    assert (mean.dtype, m2.dtype) == (torch.float64, torch.float64)
    assert_close(count, expected.count, dtype=torch.float64, what="count")
    var = m2 / count.clamp(min=1).unsqueeze(1)
    std = (expected.var + EPS) ** 0.5
    assert_close(mean, expected.mean, dtype=torch.float32, scale=1 / std, what="mean")
    assert_close(var, expected.var, dtype=torch.float32, scale=1 / std**2, what="var")

    rstd = (var + EPS).rsqrt()
    y = engine.normalize(x, mean, rstd, weight, bias, **options)
    assert (y.dtype, y.shape) == (x.dtype, x.shape)
    assert y.stride() == torch.empty_like(x).stride()
    assert_close(y, expected.y, dtype=case.dtype, what="y")

    sums = engine.backward_reduce(x, dy, mean, rstd, weight, bias, **options)
    coefficients = _coefficients(inputs, found, sums)
    dx, dresidual = engine.backward_apply(x, dy, mean, rstd, coefficients, weight, bias, **options)
    _assert_gradients(case, expected, dx, sums[1].sum(0), sums[0].sum(0), dresidual)


@pytest.mark.one_in(3)
@pytest.mark.usefixtures("chunks")
@every_engine_and_case(NAMES, CASES)
def test_fused_pairs(name: str, case: Case) -> None:
    case = trimmed(name, case)
    engine, inputs = Primitives(choose.load(name), own_statistics=True), case.make(device=device(name))
    x, weight, bias, _, dy, _ = inputs
    expected = case_results(case, eps=EPS)
    options = _options(case, inputs)
    y, found, rstd = engine.forward(x, EPS, weight, bias, **options)
    assert_close(y, expected.y, dtype=case.dtype, what="y")
    assert_close(rstd, expected.rstd, dtype=torch.float32, scale=1 / expected.rstd, what="rstd")

    _assert_gradients(
        case, expected, *engine.backward(x, dy, found.mean, rstd, False, weight, bias, **options)
    )


@every_engine
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_given_statistics_are_constants_of_the_gradient(name: str, activation: str | None) -> None:
    engine = Primitives(choose.load(name))
    case = Case("given", (3, 5, 7, 9), residual=True, activation=activation)
    inputs = case.make()
    x, weight, bias, residual, dy, _ = inputs
    mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    expected = reference_results(case, inputs, eps=EPS, mean=mean, var=var)
    given = mean.unsqueeze(0), (var + EPS).rsqrt().unsqueeze(0)
    options = {"residual": residual, "activation": activation}
    assert_close(engine.normalize(x, *given, weight, bias, **options), expected.y, dtype=case.dtype, what="y")
    _assert_gradients(case, expected, *engine.backward(x, dy, *given, True, weight, bias, **options))


@every_engine
@pytest.mark.parametrize("by", ["a mask", "its group"])
def test_one_value_per_channel_is_its_own_mean(name: str, by: str) -> None:
    x = (torch.randn(3, 5) + 4).to(device(name))
    mask = torch.tensor([False, True, False], device=x.device) if by == "a mask" else None
    count, mean, m2 = Primitives(choose.load(name)).moments(
        x, mask=mask, group_size=1 if mask is None else None
    )
    expected = (x if mask is None else x[1:2]).double()
    assert (count == 1).all()
    torch.testing.assert_close(mean, expected, rtol=0, atol=0)
    torch.testing.assert_close(m2, torch.zeros_like(m2), rtol=0, atol=0)


@every_engine
def test_nothing_is_written_to_the_inputs(name: str) -> None:
    engine = Primitives(choose.load(name))
    case = Case("inputs", (5, 4, 6, 3), masked=True, residual=True, activation="silu", dtype=torch.float64)
    inputs = case.make()
    before = [None if tensor is None else tensor.clone() for tensor in inputs]
    options = _options(case, inputs)
    _, found, rstd = engine.forward(inputs.x, EPS, inputs.weight, inputs.bias, **options)
    engine.backward(inputs.x, inputs.dy, found.mean, rstd, False, inputs.weight, inputs.bias, **options)
    torch.testing.assert_close(list(inputs), before, rtol=0, atol=0, equal_nan=True)


@every_engine
@pytest.mark.parametrize("shape", [(64, 1, 90, 70), (1, 1, 300_000), (40, 3, 70, 50), (9000, 67)], ids=str)
def test_the_number_of_threads_changes_no_bit(name: str, shape: tuple[int, ...]) -> None:
    engine = Primitives(choose.load(name))
    shape = trimmed(name, Case("threads", shape)).shape
    x, dy = (torch.randn(shape, device=device(name)) + mean for mean in (3, 0))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 1):
            torch.set_num_threads(number)
            y, (_, mean, m2), rstd = engine.forward(x, EPS, activation="silu")
            sums = engine.backward_reduce(x, dy, mean, rstd, activation="silu")
            results.append((y, mean, m2, *sums))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=0)


def test_a_device_without_float64_keeps_float32_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchnorm.kernels.interface._WITHOUT_FLOAT64", frozenset({"cpu"}))
    case = Case("narrow", (13, 5, 4), residual=True, activation="silu")
    inputs = case.make()
    y, found, _ = Primitives(eager).forward(
        inputs.x, EPS, inputs.weight, inputs.bias, **_options(case, inputs)
    )
    assert found.mean.dtype == torch.float32
    assert_close(y, case_results(case, eps=EPS).y, dtype=torch.float32, what="y")
