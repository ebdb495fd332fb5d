"""The verbs on models know policies and the options of layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.errors import OptionError
from batchnorm.models.norms.timm import BatchNormAct2d
from tests.models.foreign import timm_norm  # noqa: F401 -- a fixture
from tests.torch.twins import assert_identical, scramble, state

POLICIES = {
    "batch": batchnorm.Batch(),
    "ghost": batchnorm.Ghost(2),
    "synced": batchnorm.Synced(over=batchnorm.Ghost(4)),
    "renorm": batchnorm.Renorm(2.0, 1.0),
    "adapted": batchnorm.Adapted(3),
}
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
X = (6, 3, 5, 5)


def net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    norm = batchnorm.BatchNorm2d(4, **options) if options else nn.BatchNorm2d(4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), scramble(norm), nn.ReLU())


@every_policy
def test_row_4_unfreeze_gives_back_what_was_before(policy: Any) -> None:
    """Row 4: copies and pickled models know it too, and freezing twice forgets nothing."""
    model = net(statistics=policy)
    for _ in range(2):
        batchnorm.freeze(model)
        assert model[1].statistics == batchnorm.Running()
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        batchnorm.unfreeze(one)
        assert one[1].statistics == policy
        assert "_thawed" not in vars(one[1])


def test_what_is_set_in_between_stays() -> None:
    model = batchnorm.freeze(net(statistics=batchnorm.Ghost(2)))
    model[1].statistics = batchnorm.Renorm()
    batchnorm.unfreeze(model)
    assert model[1].statistics == batchnorm.Renorm()
    model[1].statistics = batchnorm.Running()
    batchnorm.unfreeze(model)
    assert model[1].statistics == batchnorm.Batch()
    stock = batchnorm.freeze(net())
    assert batchnorm.unfreeze(stock)[1].statistics == batchnorm.Batch()
    synchronized = batchnorm.freeze(nn.Sequential(nn.SyncBatchNorm(4)))
    assert batchnorm.unfreeze(synchronized)[0].statistics == batchnorm.Synced()


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({}, "batch"),
        ({"statistics": batchnorm.Ghost(32)}, "ghost(size=32)"),
        ({"statistics": batchnorm.Renorm()}, "renorm"),
        ({"statistics": batchnorm.Renorm(2)}, "renorm(r_max=2.0)"),
        ({"statistics": batchnorm.Synced(over=batchnorm.Ghost(4))}, "synced(over=ghost(size=4))"),
        ({"track_running_stats": False}, "batch, untracked"),
        ({"statistics": batchnorm.Ghost(4), "track_running_stats": False}, "ghost(size=4), untracked"),
        ({"nonfinite": "skip", "small_batch": "running"}, "batch, nonfinite=skip, small_batch=running"),
        ({"domains": 3}, "batch, domain 0 of 3"),
    ],
    ids=str,
)  # fmt: skip
def test_inspect_shows_policy_and_options(options: dict[str, Any], shown: str) -> None:
    model = net(**options)
    assert batchnorm.inspect(model).rows[0].policy == shown
    assert shown in str(batchnorm.inspect(model))


def test_row_35_within_a_block_inspect_shows_that_domain() -> None:
    """Row 35: its health too."""
    model = net(domains=2)
    with batchnorm.domain(model, 1):
        model[1].running_var.fill_(torch.nan)
        (row,) = batchnorm.inspect(model).rows
    assert row.policy == "batch, domain 1 of 2"
    assert row.health == ("NaN or inf (4 of 4)",)
    assert "NaN or inf" in row.stays
    (row,) = batchnorm.inspect(model).rows
    assert row.health == ("initial values in the statistics",)  # after one batch
    assert row.folds_into == "0 (before)"


@every_policy
@pytest.mark.parametrize("with_example", [False, True])
def test_fold_takes_the_running_statistics_whatever_the_policy(policy: Any, with_example: bool) -> None:
    """But that of a norm that adapts: it stays, and the copy adapts as the model does."""
    model, x = net(statistics=policy).eval(), torch.randn(X)
    folded = batchnorm.fold(model, x if with_example else None)
    norms = [m for m in folded.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    is_adapted = policy == batchnorm.Adapted(3)
    assert len(norms) == is_adapted
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-5)
    (row,) = batchnorm.inspect(model).rows
    assert ("adapts to each batch" in row.stays) == is_adapted


def test_row_35_fold_within_a_block_folds_that_domain() -> None:
    """Row 35: and what does not fold keeps that domain's alone, in the copy's state too."""
    model = net(domains=3).eval()
    model.append(scramble(batchnorm.BatchNorm2d(4, domains=3)).eval())
    for k in range(3):
        with batchnorm.domain(model, k):
            scramble(model[1])
            scramble(model[3])
    x = torch.randn(X)
    before, outputs = state(model), []
    for k in range(3):
        with batchnorm.domain(model, k):
            folded = batchnorm.fold(model, x)
            expected = model(x)
        outputs.append(expected)
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-5)
        stayed = pickle.loads(pickle.dumps(folded))[3]
        assert stayed.domains == 1
        assert list(stayed.state_dict()) == list(nn.BatchNorm2d(4).state_dict())
        torch.testing.assert_close(pickle.loads(pickle.dumps(folded))(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(outputs[0], outputs[1])
    torch.testing.assert_close(batchnorm.fold(model)(x), outputs[0], rtol=1e-4, atol=1e-5)
    assert_identical(state(model), before)


@every_policy
def test_convert_gives_every_layer_a_policy(policy: Any) -> None:
    model = batchnorm.convert(nn.Sequential(*net(), nn.LazyBatchNorm2d()), statistics=policy)
    model(torch.randn(X))
    assert model[1].statistics == model[3].statistics == policy


def test_row_35_convert_gives_domains() -> None:
    """Row 35: each starts as what is there; in place, and again without effect."""
    model = net()
    before = state(model[1])
    for _ in range(2):
        batchnorm.convert(model, domains=3)
    for k in range(3):
        with batchnorm.domain(model, k):
            assert all(torch.equal(getattr(model[1], n), before[n]) for n in before)
    assert len(model.state_dict()) == len(net().state_dict()) + 6
    one = net(domains=2)
    after = list(one.state_dict())
    for model, domains, why in (
        (one, 3, "it has 2 domains"),
        (net(), 0, "whole number"),
        (net(track_running_stats=False), 2, "track_running_stats=True"),
        (nn.Sequential(nn.LazyBatchNorm2d()), 2, "not initialized"),
    ):
        with pytest.raises(OptionError, match=rf"^[01] \(.*{why}"):
            batchnorm.convert(model, domains=domains)
    assert list(one.state_dict()) == after


@every_policy
def test_fuse_keeps_policy_and_options(policy: Any) -> None:
    options = {"statistics": policy, "nonfinite": "skip", "small_batch": "running", "domains": 2}
    model, x = net(**options), torch.randn(X)
    plain = copy.deepcopy(model)
    before = state(model)
    batchnorm.fuse(model, x)
    norm = model[1]
    assert norm.activation == "relu"
    assert {name: getattr(norm, name) for name in options} == options
    assert_identical(state(model), before)
    with batchnorm.domain(model, 1), batchnorm.domain(plain, 1):
        torch.testing.assert_close(model(x), plain(x))
    assert_identical(state(model), state(plain))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"nonfinite": "skip"}, r"nonfinite='skip', .*layer.nonfinite = 'propagate' first"),
        ({"nonfinite": "raise"}, r"nonfinite='raise'"),
        ({"small_batch": "running"}, r"small_batch='running', .*layer.small_batch = 'raise' first"),
        ({"domains": 2}, r"domains=2, .*one domain"),
        *(({"statistics": p}, "statistics=") for n, p in POLICIES.items() if n != "batch"),
    ],
    ids=str,
)
def test_revert_refuses_what_stock_cannot_say(options: dict[str, Any], why: str) -> None:
    model = net(**options)
    before = dict(vars(model[1]))
    with pytest.raises(OptionError, match=rf"^1 \(batchnorm.BatchNorm2d\): {why}"):
        batchnorm.revert(model)
    assert type(model[1]) is batchnorm.BatchNorm2d
    assert vars(model[1]).keys() == before.keys()


def test_revert_leaves_nothing_of_ours() -> None:
    """Whatever a layer has been through."""
    model, x = net(nonfinite="skip", small_batch="running"), torch.randn(X)
    model[1].nonfinite, model[1].small_batch = "propagate", "raise"
    batchnorm.unfreeze(batchnorm.freeze(model))
    with batchnorm.mask(model, torch.ones(6, 3, 3, dtype=torch.bool)), torch.no_grad():
        model(x)
    batchnorm.revert(model)
    stock = vars(nn.BatchNorm2d(4))
    assert vars(model[1]).keys() == stock.keys()
    assert vars(model[1])["_buffers"].keys() == stock["_buffers"].keys()
    assert vars(model[1])["_non_persistent_buffers_set"] == set()


class Sigmoid(nn.Module):
    """An activation that no layer has, and that is not 0 at 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sigmoid() + 1


@pytest.mark.parametrize("way", ["mask", "context", "calibrated"])
@pytest.mark.parametrize("act", [nn.ReLU(), Sigmoid()], ids=["fused", "inside"])
def test_row_2_timms_norm_takes_masks_too(timm_norm: Any, act: nn.Module, way: str) -> None:  # noqa: F811
    """Row 2: what comes out is 0 where masked, although its own activation is not 0 at 0."""
    model = nn.Sequential(scramble(timm_norm(4, act)))
    batchnorm.convert(model)
    norm = model[0]
    assert type(norm) is BatchNormAct2d
    x, mask = torch.randn(6, 4, 5, 5), torch.rand(6, 5, 5) > 0.4
    plain = scramble(batchnorm.BatchNorm2d(4))
    plain.load_state_dict(norm.state_dict())
    expected = torch.where(mask.unsqueeze(1), act(plain(x, mask=mask)), 0.0)
    if way == "mask":
        y = norm(x, mask=mask)
    else:
        with batchnorm.mask(model, mask):
            y = model(x)
    torch.testing.assert_close(y, expected)
    if way == "calibrated":
        batchnorm.calibrate(model, [x], forward=lambda m, b: m[0](b, mask=mask))
        other = nn.Sequential(plain)
        batchnorm.calibrate(other, [x], forward=lambda m, b: m[0](b, mask=mask))
        assert_identical(state(norm), state(plain))
