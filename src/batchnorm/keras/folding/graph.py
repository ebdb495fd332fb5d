"""The graph of a Keras model with the models inside it laid open: which layer reads what, call by call.

Keras's only public view of its graph is the serialized one, which asks every layer for its config. So this
file, and it alone, reads `_keras_history` and `_inbound_nodes`, from the model's outputs back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import keras

from batchnorm.errors import OptionError


class Value(NamedTuple):
    """One tensor of the graph; the same number all along, into a nested model and out of it.

    Attributes:
        number: its identity.
        rank: number of axes, batch included.
        dtype: name.
    """

    number: int
    rank: int
    dtype: str


@dataclass(frozen=True)
class Call:
    """One call of a layer or of an operation.

    Attributes:
        layer: what is called.
        name: qualified by the models around it, such as `backbone/conv_1`.
        reads: the tensors among its arguments, the layer's input first.
        gives: its outputs.
        trains: it, or a model around it, is called with training=True in the graph.
    """

    layer: Any
    name: str
    reads: tuple[Value, ...]
    gives: tuple[Value, ...]
    trains: bool


@dataclass
class Graph:
    """All calls of a model, in an order in which they can run.

    Attributes:
        calls: nested models are replaced by what they call, once for every time that they are called.
        outputs: of the model.
        held: ids of the layers inside wrappers and other layers without a graph: called who knows how often.
    """

    calls: list[Call] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    held: set[int] = field(default_factory=set)


def has_graph(layer: Any) -> bool:
    """Whether `layer` is a built Sequential or functional model that runs as Keras runs those."""
    if not isinstance(layer, keras.Model):
        return False
    if isinstance(layer, keras.Sequential):
        # A Sequential that was never built, or that Keras could not trace, has no inputs.
        return type(layer).call is keras.Sequential.call and getattr(layer, "inputs", None) is not None
    if not isinstance(layer, keras.Function):
        return False
    return type(layer).call is type(untrained(layer)).call


def untrained(model: Any) -> Any:
    """Return a functional model over the same layers that was never compiled."""
    return keras.Model(model.input, model.output, name=model.name)


def check_model(model: Any, verb: str) -> None:
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


def graph(model: Any) -> Graph:
    """Return the graph of a model that `check_model` let pass."""
    found = Graph()
    inputs = {id(tensor): _fresh(tensor) for tensor in model.inputs}
    found.outputs = _walk(found, model, inputs, "", trains=False)
    for call in found.calls:
        if isinstance(call.layer, keras.layers.Layer):  # the others are operations: no layers in them
            found.held |= {id(layer) for layer in call.layer._flatten_layers(include_self=False)}
    return found


_numbers = iter(range(2**62))


def _fresh(tensor: Any) -> Value:
    return Value(next(_numbers), len(tensor.shape), tensor.dtype)


def _walk(found: Graph, model: Any, values: dict[int, Value], path: str, trains: bool) -> list[Value]:
    """Add the calls of one model to `found`; `values`: what its inputs are. Return what its outputs are."""
    for node in _nodes(model.outputs, set(values)):
        name = f"{path}/{node.operation.name}" if path else node.operation.name
        reads = tuple(values[id(tensor)] for tensor in node.input_tensors)
        training = trains or _is_training(node)
        gives = None
        if has_graph(node.operation):
            gives = _walk_nested(found, node, values, name, training)
        if gives is None:
            gives = [_fresh(tensor) for tensor in node.outputs]
            found.calls.append(Call(node.operation, name, reads, tuple(gives), training))
        values.update(zip(map(id, node.outputs), gives, strict=True))
    return [values[id(tensor)] for tensor in model.outputs]


def _walk_nested(
    found: Graph, node: Any, values: dict[int, Value], path: str, trains: bool
) -> list[Value] | None:
    """Add the calls inside a nested model; None, with nothing added, where its inputs cannot be matched."""
    model = node.operation
    given = _in_order(node.arguments.args[0], model) if node.arguments.args else []
    if [len(tensor.shape) for tensor in given] != [len(tensor.shape) for tensor in model.inputs]:
        return None
    inner = {id(own): values[id(tensor)] for own, tensor in zip(model.inputs, given, strict=True)}
    return _walk(found, model, inner, path, trains)


def _in_order(given: Any, model: Any) -> list[Any]:
    """The tensors that a nested model was called with, in the order of its inputs."""
    names = [tensor.name for tensor in model.inputs]
    takes_names = not isinstance(model, keras.Sequential) and isinstance(model.input, dict)
    if isinstance(given, dict) and not takes_names:
        return [given[name] for name in names] if set(names) <= set(given) else []
    return [tensor for tensor in keras.tree.flatten(given) if isinstance(tensor, keras.KerasTensor)]


def _nodes(outputs: Sequence[Any], known: set[int]) -> Iterator[Any]:
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


def input_layer(tensor: Any) -> Any:
    """The InputLayer of one of a model's inputs: a Sequential does not list its own among its layers."""
    return _origin(tensor).operation


def _origin(tensor: Any) -> Any:
    operation, number, _ = tensor._keras_history
    return operation._inbound_nodes[number]


def _is_training(node: Any) -> bool:
    """Whether the graph itself says training=True, by name or as the second argument."""
    second = node.arguments.args[1] if len(node.arguments.args) > 1 else None
    return node.arguments.kwargs.get("training") is True or second is True
