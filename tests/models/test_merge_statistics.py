"""`merge_statistics`: exact against pooled data, for states, files and processes, and atomic."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import ArgumentTypeError, DataError, OptionError

UNEVEN = (700, 41, 2, 1)  # values per channel of each client


def _parts(channels: int = 3) -> list[Tensor]:
    """Return the data of clients whose means are far apart."""
    torch.manual_seed(0)
    return [(k + 1) * torch.randn(size, channels).double() + 10 * k for k, size in enumerate(UNEVEN)]


def _state(part: Tensor) -> dict[str, Tensor]:
    """Return the state of a norm that has the statistics of a part; of one value, any variance."""
    norm = nn.BatchNorm1d(part.shape[1]).double()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.running_mean.copy_(part.mean(0))
    if len(part) > 1:
        norm.running_var.copy_(part.var(0))
    norm.num_batches_tracked.fill_(len(part))
    return nn.Sequential(nn.Identity(), norm).state_dict()


def test_uneven_clients_merge_into_the_statistics_of_their_pooled_data() -> None:
    """Pain row 40."""
    parts = _parts()
    merged = batchnorm.merge_statistics(map(_state, parts), UNEVEN)
    pooled = torch.cat(parts)
    torch.testing.assert_close(merged["1.running_mean"], pooled.mean(0), rtol=1e-13, atol=0)
    torch.testing.assert_close(merged["1.running_var"], pooled.var(0), rtol=1e-13, atol=0)
    assert merged["1.num_batches_tracked"] == sum(UNEVEN)
    assert set(merged) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    model = nn.Sequential(nn.Identity(), batchnorm.BatchNorm1d(3))
    assert model.load_state_dict(merged, strict=False).unexpected_keys == []


def test_files_merge_as_states_do(tmp_path: Path) -> None:
    states = [_state(part) for part in _parts()]
    files = [tmp_path / "a.pt", tmp_path / "b.ckpt", tmp_path / "c.safetensors"]
    torch.save(states[0], files[0])
    torch.save({"state_dict": states[1]}, files[1])
    save_file(states[2], files[2])
    merged = batchnorm.merge_statistics([*files[:2], str(files[2]), states[3]], UNEVEN)
    torch.testing.assert_close(merged, batchnorm.merge_statistics(states, UNEVEN), rtol=0, atol=0)


def test_reports_of_calibrations_are_counts_of_each_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, stride=2), batchnorm.BatchNorm2d(4)
    )
    x = torch.randn(23, 2, 9, 9) * 3 + 1
    clients = [copy.deepcopy(model) for _ in range(3)]
    reports = [batchnorm.calibrate(c, [part]) for c, part in zip(clients, x.split([15, 7, 1]), strict=True)]
    merged = batchnorm.merge_statistics([client.state_dict() for client in clients], reports)
    batchnorm.calibrate(model, x.split([15, 7, 1]))
    for name, buffer in model.named_buffers():
        if "running" in name:
            torch.testing.assert_close(merged[name], buffer, rtol=1e-6, atol=1e-7)
    by_name = [{"1": r.layers[0].values, "3": r.layers[1].values} for r in reports]
    again = batchnorm.merge_statistics([client.state_dict() for client in clients], by_name)
    torch.testing.assert_close(again, merged, rtol=0, atol=0)


def test_domains_merge_apart_by_counts_of_their_buffers() -> None:
    torch.manual_seed(1)
    parts = [torch.randn(size, 2).double() * 2 for size in (9, 30, 14, 5)]
    norms = [batchnorm.BatchNorm1d(2, domains=2).double() for _ in range(2)]
    for k, norm in enumerate(norms):
        for domain in range(2):
            with batchnorm.domain(norm, domain):
                batchnorm.calibrate(norm, [parts[2 * k + domain]])
    counts = [{"": 9, "running_mean_1": 30}, {"": 14, "running_mean_1": 5}]
    merged = batchnorm.merge_statistics([norm.state_dict() for norm in norms], counts)
    for end, pooled in (("", parts[0::2]), ("_1", parts[1::2])):
        torch.testing.assert_close(merged[f"running_var{end}"], torch.cat(pooled).var(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(merged[f"running_mean{end}"], torch.cat(pooled).mean(0), rtol=1e-6, atol=0)


def test_a_state_without_data_is_not_looked_at() -> None:
    states = [_state(part) for part in _parts()]
    broken = _state(_parts()[0])
    broken["1.running_var"][1] = float("nan")
    merged = batchnorm.merge_statistics([broken, *states], [0, *UNEVEN])
    torch.testing.assert_close(
        {name: merged[name] for name in ("1.running_mean", "1.running_var")},
        {
            name: value
            for name, value in batchnorm.merge_statistics(states, UNEVEN).items()
            if name != "1.num_batches_tracked"
        },
        rtol=0,
        atol=0,
    )


def test_dtype_and_counts_are_those_of_the_states() -> None:
    states = [nn.BatchNorm1d(2).state_dict() for _ in range(2)]
    merged = batchnorm.merge_statistics(states, [np.int64(4), 2.5])
    assert merged["running_var"].dtype == torch.float32
    assert merged["num_batches_tracked"].dtype == torch.int64
    del states[0]["num_batches_tracked"]
    assert "num_batches_tracked" not in batchnorm.merge_statistics(states, [1, 1])


def _good() -> dict[str, Tensor]:
    return _state(_parts()[0])


@pytest.mark.parametrize(
    ("states", "counts", "error", "says"),
    [
        (lambda: _good(), [5], ArgumentTypeError, "list of state_dicts"),
        (lambda: [nn.BatchNorm1d(3)], [5], ArgumentTypeError, "states[0] is a model: pass its .state_dict()"),
        (lambda: [_good(), 5], [5, 5], DataError, "states[1]: it holds no state"),
        (list, [], DataError, "no state to merge"),
        (lambda: [_good()], [5, 5], OptionError, "one entry per state: got 2 for 1"),
        (lambda: [nn.Linear(2, 2).state_dict()], [5], DataError, "states[0] has no running statistics"),
        (lambda: [_good(), _state(torch.randn(3, 4))], [5, 5], DataError, "[4] in states[1] and [3] in"),
        (
            lambda: [_good(), nn.BatchNorm1d(3).state_dict()],
            [5, 5],
            DataError,
            "merge states of the same model",
        ),
        (
            lambda: [_good() | {"1.running_var": -torch.ones(3)}],
            [5],
            DataError,
            "negative variance in 1.running",
        ),
        (lambda: [_good() | {"1.running_mean": torch.ones(3) / 0}], [5], DataError, "states[0] has NaN, inf"),
        (lambda: [_good()], [-1], OptionError, "0 or more; got -1 for states[0]"),
        (lambda: [_good()], [float("nan")], OptionError, "got nan for states[0]"),
        (lambda: [_good()], [True], OptionError, "got True"),
        (lambda: [_good()], ["7"], OptionError, "got '7'"),
        (lambda: [_good()], [{"2": 5}], OptionError, "the counts of states[0] lack '1'; they have 2"),
        (lambda: [_good(), _good()], [0, 1], DataError, "1: 1 values per channel in all states"),
        (lambda: [_good(), _good()], [0, 0], DataError, "1: 0 values per channel in all states"),
    ],
)
def test_wrong_states_and_counts_are_errors_that_say_which(
    states: Any, counts: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error) as caught:
        batchnorm.merge_statistics(states(), counts)
    assert says in str(caught.value)


def test_a_file_that_is_no_state_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.pt"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(DataError, match=r"bad\.pt is not read"):
        batchnorm.merge_statistics([path], [5])
    torch.save([1, 2], path)
    with pytest.raises(DataError, match=r"bad\.pt: it holds no state"):
        batchnorm.merge_statistics([path], [5])
