from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d, Ghost, Renorm
from batchnorm.errors import DataError, OptionError
from batchnorm.studies.arms import parse_arm
from batchnorm.studies.errors import StudyError
from batchnorm.studies.learner_torch import weight_layers
from batchnorm.studies.networks import WS_EPS, WS_GAIN
from batchnorm.studies.networks_torch import NormFactory, PositionGroupNorm, PositionNorm, build_network
from batchnorm.studies.options import ARMS

from .own_code import write_own_code


def kinds(module: nn.Module) -> list[type[nn.Module]]:
    return [type(part) for part in (module if isinstance(module, nn.Sequential) else [module])]


def factory(arm: str) -> NormFactory:
    return NormFactory(parse_arm(arm))


def test_normalization_comes_before_the_activation_and_dropout_after_it() -> None:
    made = factory("batchnorm+dropout")(5, activation=nn.ReLU())
    assert kinds(made) == [BatchNorm1d, nn.ReLU, nn.Dropout]


@pytest.mark.parametrize(
    ("arm", "spatial_dims", "expected"),
    [
        ("none", 0, nn.Identity),
        ("l1", 2, nn.Identity),
        ("batchnorm", 0, BatchNorm1d),
        ("batchnorm", 1, BatchNorm1d),
        ("batchnorm", 2, BatchNorm2d),
        ("batchnorm+l2", 3, BatchNorm3d),
        ("layernorm", 0, nn.LayerNorm),
        ("layernorm", 1, PositionNorm),
        ("layernorm", 2, nn.GroupNorm),
        ("dropout", 0, nn.Dropout),
        ("dropout", 1, nn.Dropout1d),
        ("dropout", 2, nn.Dropout2d),
    ],
)
def test_each_arm_gives_its_own_layer_for_its_own_rank(
    arm: str, spatial_dims: int, expected: type[nn.Module]
) -> None:
    made = factory(arm)(6, spatial_dims=spatial_dims)
    assert kinds(made) == [expected]
    x = torch.randn(4, 6, *[3] * spatial_dims)
    assert made(x).shape == x.shape


def test_dropout_probability_is_the_arms_unless_the_network_says() -> None:
    assert [factory("dropout")(4, dims).p for dims in (0, 2)] == [0.5, 0.2]
    assert factory("dropout")(4, dropout=0.1).p == 0.1


def test_a_rank_that_no_layer_has_is_refused() -> None:
    with pytest.raises(OptionError, match="spatial_dims is 0, 1, 2 or 3"):
        factory("none")(4, 4)


@pytest.mark.parametrize("network", ["mlp", "deep", "residual-mlp", "cnn", "resnet8"])
def test_arms_of_a_seed_start_from_the_same_weights(network: str) -> None:
    weights = []
    for arm in (*ARMS, "stock", "groupnorm", "skipinit", "dropout+batchnorm:after-activation"):
        model = build_network(network, parse_arm(arm), (28, 28), 10, seed=4)
        weights.append({name: layer.weight for name, layer in weight_layers(model).items()})
        assert model(torch.rand(3, 28, 28)).shape == (3, 10)
    for other in weights[1:]:
        assert other.keys() == weights[0].keys()
        for name, weight in weights[0].items():
            assert torch.equal(weight, other[name])
    another = weight_layers(build_network(network, parse_arm("none"), (28, 28), 10, seed=5))
    assert not any(torch.equal(weight, another[name].weight) for name, weight in weights[0].items())


def test_mlp_is_the_textbook_one() -> None:
    model = build_network("mlp", parse_arm("batchnorm"), (28, 28), 10, seed=0)
    assert kinds(model) == [nn.Flatten, nn.Linear, nn.ReLU, BatchNorm1d, nn.Linear]
    assert [tuple(layer.weight.shape) for layer in weight_layers(model).values()] == [(64, 784), (10, 64)]


def test_deep_normalizes_before_each_of_eight_sigmoids() -> None:
    model = build_network("deep", parse_arm("batchnorm"), (28, 28), 10, seed=0)
    blocks = [part for part in model if isinstance(part, nn.Sequential)]
    assert [kinds(block) for block in blocks] == [[BatchNorm1d, nn.Sigmoid]] * 8
    limit = (6 / 200) ** 0.5
    assert 0.95 * limit < model.linear5.weight.abs().max() <= limit
    assert not model.linear5.bias.any()


def test_cnn_takes_images_with_and_without_channels() -> None:
    assert build_network("cnn", parse_arm("batchnorm"), (3, 16, 20), 4, 0)(
        torch.rand(2, 3, 16, 20)
    ).shape == (2, 4)
    with pytest.raises(DataError, match=r"cnn needs images .* shape \(4,\)"):
        build_network("cnn", parse_arm("none"), (4,), 3, 0)


def test_building_leaves_the_callers_random_state() -> None:
    before = torch.get_rng_state()
    build_network("mlp", parse_arm("none"), (4,), 3, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_own_network_gets_the_arms_layers(tmp_path: Path) -> None:
    model = build_network(f"{write_own_code(tmp_path)}:net", parse_arm("batchnorm"), (4,), 3, 0)
    assert any(isinstance(layer, BatchNorm1d) for layer in model.modules())


def test_own_network_that_fails_is_named_with_arm_and_line(tmp_path: Path) -> None:
    own = write_own_code(tmp_path)
    line = 1 + own.read_text().splitlines().index('        raise RuntimeError("no such layer here")')
    with pytest.raises(
        StudyError, match=rf"arm batchnorm: RuntimeError: no such layer here \(own.py, line {line}\)"
    ):
        build_network(f"{own}:raises", parse_arm("batchnorm"), (4,), 3, 0)
    with pytest.raises(StudyError, match="no_module returned int, not a torch"):
        build_network(f"{own}:no_module", parse_arm("none"), (4,), 3, 0)


NO_ARMS = ["bn", "batchnorm+layernorm", "none+l1", "l2+l2", "batchnorm+", "", "batchnorm:", "stock:unmasked"]
NO_ARMS += ["batchnorm:Ghost(__import__('os'))", "batchnorm:Ghost", "batchnorm:Ghost(0)", "l1:Ghost(4)"]
NO_ARMS += ["batchnorm:Running(after=2)", "batchnorm:Renorm():Ghost(4)", "batchnorm:Ghost(size=4, why=1)"]


@pytest.mark.parametrize("arm", NO_ARMS)
def test_arms_that_make_no_sense_are_refused(arm: str) -> None:
    with pytest.raises(OptionError, match="arm"):
        parse_arm(arm)


def test_policies_and_places_of_an_arm_reach_its_layers() -> None:
    made = factory("batchnorm:Ghost(size=4)+dropout")(6, activation=nn.ReLU())
    assert made.norm.statistics == Ghost(4)
    made = factory("dropout+batchnorm:after-activation:Renorm()")(6, activation=nn.ReLU())
    assert kinds(made) == [nn.Dropout, nn.ReLU, BatchNorm1d]
    assert made.norm.statistics == Renorm()
    assert kinds(factory("layernorm:after-activation")(6, activation=nn.ReLU())) == [nn.ReLU, nn.LayerNorm]
    assert parse_arm("batchnorm:Running(after=0.5)").freeze_after == 0.5
    assert kinds(factory("stock")(6, 2)) == [nn.BatchNorm2d]


def test_group_normalization_of_sequences_is_of_each_position() -> None:
    norm = factory("groupnorm")(16, 1)
    assert isinstance(norm, PositionGroupNorm)
    assert norm.num_groups == 2
    x = torch.randn(3, 16, 5)
    expected = torch.stack([torch.nn.functional.group_norm(x[:, :, i], 2) for i in range(5)], 2)
    torch.testing.assert_close(norm(x), expected)


def test_standardized_weights_have_mean_0_and_the_variance_of_the_gain() -> None:
    model = build_network("mlp", parse_arm("weightstandard"), (28, 28), 10, 0)
    hidden, last = model.linear1.weight, model.linear2
    torch.testing.assert_close(hidden.mean(1), torch.zeros(64), atol=1e-7, rtol=0)
    plain = build_network("mlp", parse_arm("none"), (28, 28), 10, 0).linear1.weight
    scale = WS_GAIN * torch.rsqrt(784 * plain.var(1, correction=0, keepdim=True) + WS_EPS)
    torch.testing.assert_close(hidden, (plain - plain.mean(1, keepdim=True)) * scale)
    assert kinds(last) == [nn.Linear]


def test_depth_is_that_of_the_setting_and_residual_branches_start_from_0_with_skipinit() -> None:
    model = build_network("residual-mlp", parse_arm("skipinit"), (28, 28), 10, 0, depth=3)
    assert len(weight_layers(model)) == 5
    x = torch.rand(4, 28, 28)
    torch.testing.assert_close(model[:5](x), model[:2](x))
    assert len(weight_layers(build_network("deep", parse_arm("none"), (28, 28), 10, 0, depth=12))) == 13
    assert len(weight_layers(build_network("resnet8", parse_arm("batchnorm"), (3, 16, 16), 9, 0))) == 10


def test_an_own_network_without_residual_branches_is_none_for_skipinit(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"skipinit: end each with norm.scale\(\)"):
        build_network(f"{write_own_code(tmp_path)}:net", parse_arm("skipinit"), (4,), 3, 0)
