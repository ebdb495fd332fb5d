"""The layers that can take a scale and a shift per channel into their weights, and what those weights are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from batchnorm.models.graph.module_hooks import is_forward_replaced

Module = TypeVar("Module", bound=nn.Module)
Family = Literal["linear", "conv", "transposed"]
_FUNCTIONS: dict[Callable[..., Tensor], type[nn.Module]] = {
    torch.nn.functional.linear: nn.Linear,
    torch.nn.functional.conv1d: nn.Conv1d,
    torch.nn.functional.conv2d: nn.Conv2d,
    torch.nn.functional.conv3d: nn.Conv3d,
    torch.nn.functional.conv_transpose1d: nn.ConvTranspose1d,
    torch.nn.functional.conv_transpose2d: nn.ConvTranspose2d,
    torch.nn.functional.conv_transpose3d: nn.ConvTranspose3d,
}
_CLASSES = tuple(_FUNCTIONS.values())
_SETTINGS = {  # after weight and bias, as the functions take them
    "linear": (),
    "conv": ("stride", "padding", "dilation", "groups"),
    "transposed": ("stride", "padding", "output_padding", "groups", "dilation"),
}
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True)
class Weights:
    """The numbers of a layer in float64, bias `[C_out]` and weight as torch shapes it."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Absorber:
    """The weights of a layer that take an affine map per channel.

    Attributes:
        cls: the plain class of torch that computes the same, given the weights.
        family: what its weight looks like.
        axes: spatial axes; 0 for a linear layer.
    """

    cls: type[nn.Module]
    family: Family
    axes: int


def absorber_of(module: nn.Module) -> Absorber | None:
    """Return how a module would take an affine map; None where it is no layer that could."""
    for cls in _CLASSES:
        if isinstance(module, cls):
            if cls is nn.Linear:
                return Absorber(cls, "linear", 0)
            assert isinstance(module, _ConvNd)
            return Absorber(cls, "transposed" if module.transposed else "conv", len(module.kernel_size))
    return None


def why_not(module: nn.Module) -> str:
    """Return why the weights of a layer cannot be others; "" if they can."""
    if listeners(module):
        return "has hooks, which would see other values"
    if is_forward_replaced(module):
        return "has a replaced forward"
    if is_plain(module):
        weight = module.weight
        assert isinstance(weight, Tensor)
        if type(weight) not in _PLAIN or weight.is_meta or not weight.is_floating_point():
            return f"has a weight that is no plain tensor of floats ({type(weight).__name__})"
        return ""
    if computed_weights(module) is None:
        return f"is a {type(module).__name__}, of which it is not known what it computes"
    return ""


def listeners(module: nn.Module) -> bool:
    """Whether a module has hooks other than those by which torch computes a weight."""
    pre = [hook for hook in module._forward_pre_hooks.values() if not _computes_weight(hook)]
    return bool(pre or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


def is_plain(module: nn.Module) -> bool:
    """Whether a layer is exactly one of torch's, with its weight as a parameter."""
    return type(module) in _CLASSES and not module._forward_pre_hooks


def _computes_weight(hook: object) -> bool:
    return isinstance(hook, (WeightNorm, SpectralNorm))


def computed_weights(module: nn.Module) -> Weights | None:
    """Return the constant weights with which a layer of another class convolves; None if they are not.

    Parametrized, weight-normalized and weight-standardized layers compute their weight anew in each call.
    The layer is run on two inputs of random numbers, in float64: it is recognized if both times it does
    exactly one convolution or product, of its very input, with the same weights, and returns what came out.
    """
    absorber = absorber_of(module)
    if absorber is None or isinstance(module, torch.jit.ScriptModule):
        return None
    try:
        twin = copied(module).double().eval()
        found = [_probe(twin, absorber, seed) for seed in (0, 1)]
    except Exception:  # a user's forward may raise anything
        return None
    first, second = found
    if first is None or second is None or not torch.equal(first.weight, second.weight):
        return None
    return first if torch.equal(first.bias, second.bias) else None


def copied(module: Module, memo: dict[int, object] | None = None) -> Module:
    """Return a deep copy; a tensor that an operation has made, which deepcopy refuses, is copied by value.

    It may be a weight that a hook has computed, a buffer, or what a forward has kept in an attribute.
    """
    memo = {} if memo is None else memo
    for part in module.modules():
        for value in pytree.tree_leaves(vars(part)):
            if isinstance(value, Tensor) and not value.is_leaf:
                memo.setdefault(id(value), value.detach().clone())
    return copy.deepcopy(module, memo)


def _probe(module: Any, absorber: Absorber, seed: int) -> Weights | None:
    if absorber.family == "linear":
        shape = [2, module.in_features]
    else:
        sizes = zip(module.kernel_size, module.dilation, strict=True)
        shape = [2, module.in_channels, *((size - 1) * step + 1 for size, step in sizes)]
    generator = torch.Generator().manual_seed(seed)
    device = next(iter(module.state_dict().values())).device
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    watch = _Watch()
    with torch.no_grad(), torch.random.fork_rng(devices=[]), watch:
        torch.manual_seed(seed)
        y = module(x)
    if len(watch.calls) != 1:
        return None
    func, args, result = watch.calls[0]
    if _FUNCTIONS[func] is not absorber.cls or args.pop("input") is not x or result is not y:
        return None
    weight, bias = args.pop("weight"), args.pop("bias", None)
    settings = {name: getattr(module, name) for name in _SETTINGS[absorber.family]}
    if any(not _is_same(value, settings[name]) for name, value in args.items()):
        return None
    return Weights(weight, _zeros(module, weight) if bias is None else bias)


def _is_same(given: object, own: object) -> bool:
    """Whether a setting is the layer's own: (1, 1) may be written 1."""
    return bool(given == own or (isinstance(own, tuple) and given in (own[0],) and len(set(own)) == 1))


class _Watch(TorchFunctionMode):
    """Notes the convolutions and products with their arguments by name, and how they ended."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, dict[str, Any], Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _FUNCTIONS:
            transposed = issubclass(_FUNCTIONS[func], nn.modules.conv._ConvTransposeNd)
            family = "linear" if func is nn.functional.linear else "transposed" if transposed else "conv"
            names = ("input", "weight", "bias", *_SETTINGS[family])
            self.calls.append((func, dict(zip(names, args, strict=False)) | kwargs, result))
        return result


def read_weights(module: nn.Module) -> Weights:
    """Return the weights of a layer that `why_not` has nothing against."""
    if not is_plain(module):
        found = computed_weights(module)
        assert found is not None
        return Weights(found.weight.detach().cpu(), found.bias.detach().cpu())
    weight = _wide(module.weight)
    return Weights(weight, _zeros(module, weight) if module.bias is None else _wide(module.bias))


def write_weights(module: nn.Module, weights: Weights) -> bool:
    """Give a layer new weights, rounded to its dtype once; if it computed them, it becomes a plain one.

    Returns whether they are finite in that dtype.
    """
    old = module.weight
    assert isinstance(old, Tensor)
    absorber = absorber_of(module)
    assert absorber is not None
    has_bias = isinstance(module.bias, Tensor) or bool(weights.bias.any())
    if not is_plain(module):
        become(module, _plain_twin(module, absorber))
    module.weight = nn.Parameter(_rounded(weights.weight, old), old.requires_grad)
    if has_bias:
        flat = torch.empty(weights.bias.shape, dtype=old.dtype, device=old.device)
        module.bias = nn.Parameter(_rounded(weights.bias, flat), old.requires_grad)
    return all(bool(tensor.isfinite().all()) for tensor in module.parameters(recurse=False))


def become(module: nn.Module, other: nn.Module) -> None:
    """Make a module be `other`, wherever it is registered or kept."""
    contents = dict(vars(other), training=False)
    vars(module).clear()
    vars(module).update(contents)
    module.__class__ = type(other)


def _plain_twin(module: nn.Module, absorber: Absorber) -> nn.Module:
    """Return a layer of torch's own class with the settings of one of a subclass, still without weights."""
    plain = absorber.cls(1, 1, 1, device="meta")
    own = {name for name in vars(plain) if not name.startswith("_") or name.startswith("_reversed_padding")}
    vars(plain).update({name: value for name, value in vars(module).items() if name in own})
    plain.register_parameter("bias", None)
    return plain


def outputs_of(module: nn.Module) -> int:
    """Return the number of output channels."""
    assert isinstance(module, (nn.Linear, _ConvNd))
    return module.out_features if isinstance(module, nn.Linear) else module.out_channels


def inputs_of(module: nn.Module) -> int:
    """Return the number of input channels."""
    assert isinstance(module, (nn.Linear, _ConvNd))
    return module.in_features if isinstance(module, nn.Linear) else module.in_channels


def _zeros(module: nn.Module, weight: Tensor) -> Tensor:
    return torch.zeros(outputs_of(module), dtype=torch.float64, device=weight.device)


def _wide(tensor: object) -> Tensor:
    """On the CPU: some devices have no float64."""
    assert isinstance(tensor, Tensor)
    return tensor.detach().cpu().double()


def _rounded(wide: Tensor, like: Tensor) -> Tensor:
    """Return the values in the dtype, device and memory layout of another tensor."""
    return torch.empty_like(like, requires_grad=False).copy_(wide)
