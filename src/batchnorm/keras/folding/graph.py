"""The graph of a Keras model with the models inside it laid open: which layer reads what, call by call.

Keras's only public view of its graph is the serialized one, which asks every layer for its config. So this
file, and it alone, reads `_keras_history` and `_inbound_nodes`, from the model's outputs back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import keras

from batchnorm.errors import OptionError
from batchnorm.folding import flow

if TYPE_CHECKING:
    from keras.src.ops.node import Node

Call: TypeAlias = flow.Call[keras.Operation]
Value: TypeAlias = flow.Value[keras.Operation]

# They hand on their input as it is at inference, so a normalization may be folded through them.
_IDENTITIES = (
    keras.layers.ActivityRegularization,
    keras.layers.AlphaDropout,
    keras.layers.Dropout,
    keras.layers.GaussianDropout,
    keras.layers.GaussianNoise,
    keras.layers.Identity,
    keras.layers.SpatialDropout1D,
    keras.layers.SpatialDropout2D,
    keras.layers.SpatialDropout3D,
)


@dataclass
class Graph(flow.Flow[keras.Operation]):
    """All calls of a model, in an order in which they can run; `what` of each is its qualified name.

    Nested models are replaced by what they call, once for every time that they are called.

    Attributes:
        training: those that the graph, of the model or of one around them, calls with training=True.
        held: ids of the layers inside wrappers and others without a graph: their calls there are not seen.
    """

    training: set[Call] = field(default_factory=set)
    held: set[int] = field(default_factory=set)


def has_graph(layer: object) -> bool:
    """Whether `layer` is a built Sequential or functional model that runs as Keras runs those."""
    if not isinstance(layer, keras.Model):
        return False
    if isinstance(layer, keras.Sequential):
        # A Sequential that was never built, or that Keras could not trace, has no inputs.
        return type(layer).call is keras.Sequential.call and getattr(layer, "inputs", None) is not None
    if not isinstance(layer, keras.Function):
        return False
    return type(layer).call is type(untrained(layer)).call


def untrained(model: keras.Model) -> keras.Model:
    """Return a functional model over the same layers that was never compiled."""
    return keras.Model(model.input, model.output, name=model.name)


def check_model(model: object, verb: str) -> None:
    """Raise unless `model` has a graph.

    Raises:
        OptionError: says what it is and what to do.
    """
    if has_graph(model):
        return
    kind = type(model).__name__
    if not isinstance(model, keras.Model):
        raise OptionError(f"{verb} takes a Sequential or functional keras.Model; got a {kind}")
    where = f"{model.name} ({kind})"
    if type(model).call is keras.Sequential.call:
        raise OptionError(
            "the model has no graph because it was never built: call model.build(input_shape), or begin it "
            f"with keras.Input(...), before {verb}",
            where,
        )
    raise OptionError(
        f"{verb} needs a model whose graph can be read, Sequential or functional; this is a subclass with a "
        "call() of its own. Build it as keras.Model(inputs, outputs), or "
        f"{verb} the Sequential and functional models that it holds, each for itself",
        where,
    )


def graph(model: keras.Model) -> Graph:
    """Return the graph of a model that `check_model` let pass; a call without a layer reads its outputs."""
    found = Graph()
    inputs: dict[int, Value] = {
        id(tensor): Value(None, tensor.shape, tensor.dtype) for tensor in model.inputs
    }
    outputs = _walk(found, model, inputs, "", trains=False)
    for call in found.calls:
        if isinstance(call.module, keras.layers.Layer):  # the others are operations: no layers in them
            found.held |= {id(layer) for layer in call.module._flatten_layers(include_self=False)}
    Call("the model's output", None, outputs)
    return found


def _walk(found: Graph, model: keras.Model, values: dict[int, Value], path: str, trains: bool) -> list[Value]:
    """Add the calls of one model to `found`; `values`: what its inputs are. Return what its outputs are."""
    for node in _nodes(model.outputs, set(values)):
        name = f"{path}/{node.operation.name}" if path else node.operation.name
        reads = [values[id(tensor)] for tensor in node.input_tensors]
        training = trains or _is_training(node)
        gives = _walk_nested(found, node, values, name, training) if has_graph(node.operation) else None
        if gives is None:
            is_same = not training and len(reads) == 1 and _is_identity(node.operation)
            call = Call(name, node.operation, reads, axes="same" if is_same else None)
            gives = [call.give(tensor.shape, tensor.dtype) for tensor in node.outputs]
            found.calls.append(call)
            if training:
                found.training.add(call)
        values.update(zip(map(id, node.outputs), gives, strict=True))
    return [values[id(tensor)] for tensor in model.outputs]


def _walk_nested(
    found: Graph, node: Node, values: dict[int, Value], path: str, trains: bool
) -> list[Value] | None:
    """Add the calls inside a nested model; None, with nothing added, where its inputs cannot be matched."""
    model = node.operation
    given = _in_order(node.arguments.args[0], model) if node.arguments.args else []
    if [len(tensor.shape) for tensor in given] != [len(tensor.shape) for tensor in model.inputs]:
        return None
    inner = {id(own): values[id(tensor)] for own, tensor in zip(model.inputs, given, strict=True)}
    return _walk(found, model, inner, path, trains)


def _in_order(given: object, model: keras.Model) -> list[keras.KerasTensor]:
    """The tensors that a nested model was called with, in the order of its inputs."""
    names = [tensor.name for tensor in model.inputs]
    takes_names = not isinstance(model, keras.Sequential) and isinstance(model.input, dict)
    if isinstance(given, dict) and not takes_names:
        return [given[name] for name in names] if set(names) <= set(given) else []
    return [tensor for tensor in keras.tree.flatten(given) if isinstance(tensor, keras.KerasTensor)]


def _nodes(outputs: Sequence[keras.KerasTensor], known: set[int]) -> Iterator[Node]:
    """Yield the calls that lead to `outputs`, each after those that it reads; depth first, on a stack."""
    done: set[int] = set()
    waiting = [(_origin(tensor), False) for tensor in reversed(outputs) if id(tensor) not in known]
    while waiting:
        node, ready = waiting.pop()
        if id(node) in done:
            continue
        if ready:
            done.add(id(node))
            yield node
            continue
        waiting.append((node, True))
        waiting += [
            (_origin(tensor), False) for tensor in reversed(node.input_tensors) if id(tensor) not in known
        ]


def input_layer(tensor: keras.KerasTensor) -> keras.layers.InputLayer:
    """The InputLayer of one of a model's inputs: a Sequential does not list its own among its layers."""
    return _origin(tensor).operation


def _origin(tensor: keras.KerasTensor) -> Node:
    operation, number, _ = tensor._keras_history
    return operation._inbound_nodes[number]


def _is_training(node: Node) -> bool:
    """Whether the graph itself says training=True, by name or as the second argument."""
    second = node.arguments.args[1] if len(node.arguments.args) > 1 else None
    return node.arguments.kwargs.get("training") is True or second is True


def _is_identity(operation: keras.Operation) -> bool:
    if type(operation) is keras.layers.Activation:
        return activation_of(operation) is None
    return type(operation) in _IDENTITIES


def activation_of(layer: keras.Operation) -> object:
    """Return a layer's own activation; None where it is linear, or has none as a stock normalization."""
    activation: object = getattr(layer, "activation", None)
    return None if activation is keras.activations.linear else activation
