"""Records the flow of a model as it runs on an example, for forwards with control flow, which are no graph.

A value is identified by its memory and layout; after a write, the same memory holds another value.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.models.verify import call as call_model
from batchnorm.models.verify import restored, set_mode

from .dispatch_observer import DispatchObserver, tensors_in, written
from .flow import Call, Flow, Value
from .module_hooks import sees_output
from .rearranged import axes_of, joins_of

_Key = tuple[Any, ...]


def recorded_flow(
    model: nn.Module, example: Any, leaves: Collection[nn.Module], *, training: bool = False
) -> tuple[Flow, set[nn.Module]]:
    """Run a model on an example; return its flow and the modules that were called.

    Args:
        model: it stays as it was.
        example: as of `fold`.
        leaves: modules of which a call is one call in the flow, whatever they do inside.
        training: run it in training, not in evaluation.
    """
    recorder = _Recorder(model, leaves)
    with restored(model), torch.no_grad():
        set_mode(model, training)
        recorder.run(example)
    return recorder.flow, recorder.called


class _Recorder(DispatchObserver):  # type: ignore[no-untyped-call]
    def __init__(self, model: nn.Module, leaves: Collection[nn.Module]) -> None:
        super().__init__()
        self.flow = Flow()
        self.called: set[nn.Module] = set()
        self._model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._leaves = leaves
        self._values: defaultdict[Any, dict[_Key, Value]] = defaultdict(dict)  # storage -> as it is now
        self._in: defaultdict[Any, list[Value]] = defaultdict(list)  # storage -> all that ever lay in it
        self._kept: list[Tensor] = []  # alive, so that no memory is used again
        self._running: list[Call] = []  # leaves

    def run(self, example: Any) -> None:
        own = [*self._model.parameters(), *self._model.buffers()]
        with self._hooks(), self.following():
            outputs = call_model(self._model, example)
        self._observe("the model's output", _tensors(outputs))
        known = set(map(id, own))
        held = [t for module in self._model.modules() for t in _tensors(_attributes(module))]
        self._observe("an attribute that keeps it", [t for t in held if id(t) not in known])
        for tensor in own:
            if any(value.readers for value in self._in.get(_storage(tensor), ())):
                self.flow.read.add(id(tensor))

    def on_function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self._running:
            self._observe(func.__name__, tensors_in((args, kwargs)))
        return func(*args, **kwargs)

    def on_operator(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        changed = written(func, args, kwargs)
        if self._running:
            self._touch(tensors_in((args, kwargs)), changed)
            return func(*args, **kwargs)
        reads = [self._read(tensor) for tensor in tensors_in((args, kwargs))]
        result = func(*args, **kwargs)
        outputs = tensors_in(result)
        is_alias = bool(outputs) and not changed and all(map(self._is_known, outputs))
        if is_alias:
            for value in reads:
                value.aliased += 1
            return result
        call = Call(str(func._schema.name).removeprefix("aten::"), None, reads)
        call.axes, call.joins = axes_of(func, args, result), joins_of(func, args, kwargs, result)
        for tensor in changed:
            self._values[_storage(tensor)].clear()  # what lay there is gone
        self._finish(call, [*outputs, *changed])
        return result

    def _read(self, tensor: Tensor) -> Value:
        """Return the value of a tensor now."""
        if not self._is_known(tensor):
            before = self._in[_storage(tensor)]
            maker = Call("memory that is also another tensor's", None, list(before)) if before else None
            self._place(tensor, Value(maker, tuple(tensor.shape), tensor.dtype))
        return self._values[_storage(tensor)][_key(tensor)]

    def _is_known(self, tensor: Tensor) -> bool:
        return _key(tensor) in self._values[_storage(tensor)]

    def _touch(self, tensors: list[Tensor], written: list[Tensor]) -> None:
        """Note what a leaf reads besides its input, and what it writes to that is not its own."""
        leaf = self._running[0]
        known = [self._read(tensor) for tensor in tensors if self._is_known(tensor)]
        others = [value for value in known if value not in leaf.reads]
        if others:
            self.flow.calls.append(Call(f"something in {leaf.what}", None, others))
        for tensor in written:
            self._values[_storage(tensor)].clear()

    def _place(self, tensor: Tensor, value: Value) -> None:
        self._kept.append(tensor)
        self._values[_storage(tensor)][_key(tensor)] = value
        self._in[_storage(tensor)].append(value)

    def _finish(self, call: Call, outputs: list[Tensor]) -> None:
        self.flow.calls.append(call)
        for tensor in {_key(tensor): tensor for tensor in outputs}.values():
            self._place(tensor, call.give(tuple(tensor.shape), tensor.dtype))

    def _observe(self, reader: str, tensors: list[Tensor]) -> None:
        """Add a reader of those tensors that the run has made or read."""
        reads = [self._read(tensor) for tensor in tensors if _storage(tensor) in self._in]
        if reads:
            self.flow.calls.append(Call(reader, None, reads))

    @contextlib.contextmanager
    def _hooks(self) -> Iterator[None]:
        handles = []
        for module in self._model.modules():
            own = (bool(module._forward_pre_hooks), sees_output(module))
            # First of all: torch's older hooks compute a layer's weight before its forward, which is inside.
            handles.append(module.register_forward_pre_hook(self._begins, prepend=True, with_kwargs=True))
            if module in self._leaves:
                handles.append(module.register_forward_hook(self._ends))
                continue
            if own[0]:
                handles.append(module.register_forward_pre_hook(self._hooked, with_kwargs=True))
            if own[1]:
                handles.append(module.register_forward_hook(self._hooked_output))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hooked(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._running:
            self._observe(f"the hooks of {self._names[module]}", tensors_in((args, kwargs)))

    def _hooked_output(self, module: nn.Module, _args: Any, result: Any) -> None:
        if not self._running:
            self._observe(f"the hooks of {self._names[module]}", tensors_in(result))

    def _begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.called.add(module)
        if module not in self._leaves:
            return
        rest = dict(kwargs)
        first = args[0] if args else rest.pop("input", None)
        others = tensors_in((args[1:], rest))
        inputs = [first, *others] if isinstance(first, Tensor) else []
        what = f"{self._names[module]} ({type(module).__name__})"
        reads = [] if self._running else [self._read(tensor) for tensor in inputs]
        self._running.append(Call(what, module, reads))

    def _ends(self, _module: nn.Module, _args: Any, result: Any) -> None:
        call = self._running.pop()
        if not self._running:
            self._finish(call, tensors_in(result))
            return
        self.flow.calls.append(call)  # within another leaf: who reads this is not seen
        Call(f"something in {self._running[-1].what}", None, [call.give(), call.give()])


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else ("id", id(tensor))


def _key(tensor: Tensor) -> _Key:
    if tensor.layout is not torch.strided:
        return ()
    return (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _attributes(module: nn.Module) -> dict[str, Any]:
    own = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_modules", "_buffers")}
    return own | {"_buffers": module._buffers}


def _tensors(value: Any, depth: int = 6) -> list[Tensor]:
    """Return the tensors in an object of any kind, as deep as outputs are nested."""
    if isinstance(value, Tensor):
        return [value]
    if depth == 0 or isinstance(value, (nn.Module, type)):
        return []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        parts = list(value)
    else:
        parts = list(vars(value).values()) if hasattr(value, "__dict__") and not callable(value) else []
    return [tensor for part in parts for tensor in _tensors(part, depth - 1)]
