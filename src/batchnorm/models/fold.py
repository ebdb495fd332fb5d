"""A copy of a model for inference, its batch normalizations folded into the layers next to them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from batchnorm.errors import OptionError
from batchnorm.folding.affine import Affine
from batchnorm.folding.plan import FoldPlan, Part
from batchnorm.folding.table import Direction
from batchnorm.torch.contexts.domains import domain_of, keep_one

from .convert import check_scripted
from .folding.affine import affine, own_activation
from .folding.arithmetic import add_beside, add_window, padding_of, place_within, scale_inputs, scale_outputs
from .folding.foldable_layers import (
    Weights,
    absorber_of,
    become,
    copied,
    inputs_of,
    is_plain,
    outputs_of,
    read_weights,
    why_not,
    write_weights,
)
from .folding.folded import FOLDED, FoldedBeside, stand_in
from .folding.plan import TorchPlanner
from .fusion.plan import inner_first, is_block
from .graph.flow import Flow, joined
from .graph.module_graph import NotTraceableError, traced
from .graph.recorded import recorded_flow
from .graph.traced import traced_flow
from .norms.find import Found, all_names, find_norms
from .norms.kinds import Layer, is_ours
from .preconditions import verb
from .revert import undo_fusion
from .verify import AgreementError, assert_agree, observe, set_mode


@verb(masked="a folded norm heeds no mask")
def fold(model: nn.Module, example: object = None) -> nn.Module:
    """Return a copy of `model` for inference, its batch normalizations folded into the layers next to them.

    In evaluation a normalization is y = s x + t per channel, s = weight / sqrt(running_var + eps) and
    t = bias - s running_mean. It goes into the layers before it, or else into those after it:

        before:  s (W x + b) + t = (s W) x + (s b + t)
        after:   W (s x + t) + b = (W s) x + (b + W t)

    These are Conv1d to 3d, ConvTranspose1d to 3d, with groups or depthwise, and Linear; after it only where
    no zeros are padded in between, or t is zero. What does nothing in evaluation may stand between, and so
    may transposing, flattening and slicing, seen on the example. Nothing else may read what changes, on any
    of its calls. What a norm applied itself, an activation or a residual, stays in its place. Layers that
    compute their weight from constants (parametrized, weight-normalized, weight-standardized) become plain.

    What is next to a norm is read off the forward of each block, symbolically: that holds for every input.
    With an example, one run of the model on it, in evaluation, tells instead, whatever its control flow. It
    also shows what is added: convolutions of the same input, whose outputs nothing else reads, become one,

        V x + c + W x + b = (V + W) x + (b + c),    V's window in the middle of W's

    Layers with `statistics=Adapted()` stay, as they adapt to each batch. A folded norm heeds no mask.
    The arithmetic is float64, rounded once to each weight's dtype. With an example the outputs of the copy
    are compared with the model's, in float64, or in the model's dtype where it does not run in that.

    Args:
        model: with layers of torch, of this library, of timm or frozen ones; it is left as it is. Of layers
            with several domains, the copy has the one that is in use (`batchnorm.domain`).
        example: what the model takes: a tensor, a tuple of arguments or a dict of keyword arguments.

    Returns:
        The copy, in evaluation mode, with parameters of its own. Where a norm was stands an `nn.Identity` or
        the activation that it applied, and where a convolution became part of another, a module that gives
        zeros. A norm that does not fold stays; `inspect` says why.

    Raises:
        OptionError: (a ValueError) a scripted or compiled model, one that is not initialized or cannot be
            copied, an example on which nothing can be compared; by name, a layer with a parametrized weight,
            in a domain that has its own.
        AgreementError: (an ArithmeticError) the outputs on the example differ by more than rounding, or a
            weight would be too large for its dtype.

    Example:
        >>> batchnorm.fold(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))[1]
        Identity()

    Differs from `torch.fx.experimental.optimization.fuse`: for models that cannot be traced, with every call
    of a layer checked, and more kinds of layers.

    Source: Jacob et al. 2018, arXiv:1712.05877, sec. 3.2; Ding et al. 2021, arXiv:2101.03697 (branches); https://github.com/pytorch/pytorch/issues/104593
    and 197539 (shared convolutions folded silently wrong).
    """
    twin = twin_of(model)
    decided = fold_plan(twin, example)
    if example is None:
        _apply(twin, decided)
        return twin
    before = observe(twin, example, training=False)
    is_checked = _agrees_in_float64(model, twin, decided, example)
    _apply(twin, decided)
    if not is_checked:
        assert_agree(before, twin, example, "fold", training=False)
    return twin


def twin_of(model: nn.Module, *, shares_tensors: bool = False) -> nn.Module:
    """Return a copy in evaluation, with what `fuse` did undone.

    Args:
        model: which is left as it is.
        shares_tensors: the copy has the model's parameters and buffers, to be looked at only.

    Raises:
        OptionError: it is scripted, compiled, not initialized or cannot be copied, or the weight of a layer
            that has one for each domain is parametrized.
    """
    check_scripted(model, "fold")
    if hasattr(model, "_orig_mod"):
        raise OptionError("fold takes a model before torch.compile: fold it, then compile the copy")
    tensors = [*model.parameters(), *model.buffers()]
    if any(is_lazy(tensor) for tensor in tensors):
        raise OptionError("the model has layers that are not initialized: run it once")
    try:
        twin: nn.Module = copied(
            model, {id(tensor): tensor for tensor in tensors} if shares_tensors else None
        )
    except Exception as error:
        raise OptionError(
            f"fold works on a copy, and {type(model).__name__} cannot be copied by copy.deepcopy "
            f"({type(error).__name__}: {error})"
        ) from error
    for (name, own), copy in zip(model.named_modules(), twin.modules(), strict=True):
        if isinstance(own, Layer) and isinstance(copy, Layer) and own.domains > 1:
            try:
                keep_one(copy, domain_of(own))
            except OptionError as error:
                raise error.at(f"{name} ({type(own).__name__})" if name else type(own).__name__) from None
    undo_fusion(twin, [found for found in find_norms(twin) if is_ours(found.module)])
    set_mode(twin, False)
    return twin


def fold_plan(twin: nn.Module, example: object) -> FoldPlan[nn.Module]:
    """Decide what folds into what in a copy of a model."""
    norms = find_norms(twin)
    layers = [module for module in twin.modules() if absorber_of(module) is not None]
    leaves = {*(found.module for found in norms), *layers}
    flows, untraceable = _traced(twin)
    if example is not None:
        run, called = recorded_flow(twin, example, leaves)
        others = [f for module, f in flows.items() if module not in called and not _is_list(module, called)]
        planner = TorchPlanner(joined([run, *others]), norms, {}, lambda _: "the example does not reach it")
    else:
        unseen = partial(_unseen, twin, untraceable)
        planner = TorchPlanner(joined(flows.values()), norms, _shared(twin, leaves), unseen)
    return planner.plan(planner.norms)


def _traced(twin: nn.Module) -> tuple[dict[nn.Module, Flow], dict[nn.Module, str]]:
    """Return the flow of every block whose forward is a graph in evaluation, and why the others' is none."""
    flows, untraceable = {}, {}
    for module in inner_first(twin):
        if is_block(module) and absorber_of(module) is None:
            try:
                flows[module] = traced_flow(module, traced(module, modes=(False,)))
            except NotTraceableError as error:
                untraceable[module] = str(error)
    return flows, untraceable


def _is_list(module: nn.Module, called: set[nn.Module]) -> bool:
    """Whether a Sequential that was not called serves as a list of the modules that were."""
    return type(module) is nn.Sequential and all(part in called for part in module.children())


def _shared(twin: nn.Module, leaves: set[nn.Module]) -> dict[nn.Module, str]:
    """Return the modules in several places: a forward that is no graph may call them too."""
    names = all_names(twin)
    return {module: ", ".join(names[module]) for module in leaves if len(names[module]) > 1}


def _unseen(twin: nn.Module, untraceable: dict[nn.Module, str], norm: Found) -> str:
    """Return why no forward that is a graph calls a norm."""
    name = norm.name
    while name:
        name = name.rpartition(".")[0]
        block = twin.get_submodule(name)
        if block in untraceable:
            return f"{type(block).__name__}.forward is no graph ({untraceable[block]}): pass example="
    return "no forward is seen to call it: pass example="


def _apply(twin: nn.Module, decided: FoldPlan[nn.Module]) -> None:
    """Fold, in place; every layer that computes its weight from constants gets it as a parameter."""
    weights = {
        module: read_weights(module)
        for module in twin.modules()
        if absorber_of(module) is not None and not is_plain(module) and not why_not(module)
    }
    for step in decided.steps:
        for part in step.into:
            now = weights.get(part.layer) or read_weights(part.layer)
            weights[part.layer] = _changed(now, part, affine(step.norm), step.direction)
    for merge in decided.merges:
        own, other = (weights.get(one) or read_weights(one) for one in (merge.layer, merge.into))
        weights.pop(merge.layer, None)
        place = place_within(merge.layer, merge.into)
        assert place is not None
        weights[merge.into] = add_window(other, own, place, merge.sign)
    for layer, changed in weights.items():
        if not write_weights(layer, changed):
            name = next(name for name, module in twin.named_modules() if module is layer)
            raise AgreementError("fold was taken back: a weight would be too large for its dtype", name)
    for step in decided.steps:
        if step.direction == "beside":
            become(step.norm, FoldedBeside(step.is_overwritten))
        else:
            become(step.norm, stand_in(own_activation(step.norm), adds=step.adds, rank=step.rank))
        vars(step.norm)[FOLDED] = True
    for merge in decided.merges:
        become(merge.layer, _zeros_of(merge.layer, merge.is_overwritten))


def _zeros_of(layer: nn.Module, is_overwritten: bool) -> FoldedBeside:
    """Return what stands in the place of a convolution that is part of another one."""
    assert isinstance(layer, _ConvNd)
    axes = zip(layer.stride, padding_of(layer), layer.dilation, layer.kernel_size, strict=True)
    windows = tuple((by, int(2 * pad) - step * (size - 1)) for by, pad, step, size in axes)
    return FoldedBeside(is_overwritten, layer.out_channels, windows)


def _changed(now: Weights, part: Part[nn.Module], found: Affine, direction: Direction) -> Weights:
    """Return the weights of a layer that takes its part of a norm."""
    layer = part.layer
    if direction == "before":
        return scale_outputs(now, layer, found.part(part.start, outputs_of(layer), part.shift))
    if direction == "after":
        return scale_inputs(now, layer, found.within(part.start, inputs_of(layer)))
    return add_beside(now, layer, found, part.shift)


def _agrees_in_float64(
    model: nn.Module, twin: nn.Module, decided: FoldPlan[nn.Module], example: object
) -> bool:
    """Raise AgreementError if the plan is wrong; return False if the model does not run in float64.

    In float32 a right plan may change an output by much, as a choice among nearly equal values does.
    """
    wide = twin_of(model).double()
    wide_example = _widened(example)
    try:
        before = observe(wide, wide_example, training=False)
    except Exception:  # a model may insist on its dtype
        return False
    _apply(wide, decided.of(dict(zip(twin.modules(), wide.modules(), strict=True))))
    assert_agree(before, wide, wide_example, "fold", training=False)
    return True


def _widened(example: object) -> object:
    def wide(leaf: object) -> object:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    given = dict(example) if isinstance(example, Mapping) else example
    widened: object = pytree.tree_map(wide, given)
    return widened
