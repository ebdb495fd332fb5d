"""Restores a model after an error or a run on an example: classes, attributes, registrations and tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from batchnorm.errors import BatchNormError


@contextlib.contextmanager
def untouched_on_error(model: nn.Module) -> Iterator[None]:
    """Restore what a verb changes in `model` if the block raises, or is interrupted.

    That is the class, attributes and registrations of each module, and which parameters learn. The values of
    tensors are not copied, as a verb writes none in place.
    """
    learning = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    structure = _Structure(model.modules())
    try:
        yield
    except BaseException:
        structure.put_back()
        for parameter, requires_grad, grad in learning:
            parameter.requires_grad = requires_grad  # lazy parameters lack the method
            parameter.grad = grad
        raise


@contextlib.contextmanager
def as_before_on_error(model: nn.Module) -> Iterator[None]:
    """Restore what forwards within the block changed in `model`, values included, if the block raises.

    Raises:
        BatchNormError: something cannot be restored; all else is.
    """
    snapshot = Snapshot(model)
    try:
        yield
    except BaseException:
        snapshot.put_back()
        raise


class Snapshot:
    """Everything that a forward may change in a model.

    Where torch.distributed manages the parameters (FSDP), parameters and attributes are left to it.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self._modes = [(module, module.training) for module in modules]
        is_free = not _is_managed(model)
        # Attributes of a scripted module are in C++, in no dict.
        free = [module for module in modules if is_free and not isinstance(module, torch.jit.ScriptModule)]
        self._structure = _Structure(free)
        held: list[Any] = [module._buffers for module in modules]
        held += [module._parameters for module in modules if is_free]
        self._registered = [(registry, name, registry[name]) for registry in held for name in registry]
        tensors = {id(tensor): tensor for _, _, tensor in self._registered if tensor is not None}
        memories: dict[Any, _Memory] = {}
        self._tensors = [_Held(tensor, memories) for tensor in tensors.values()]
        self._memories = list(memories.values())

    def put_back(self) -> None:
        """Restore everything that can be restored.

        Raises:
            BatchNormError: something cannot be.
        """
        failed = []
        steps = [self._structure.put_back, self._put_modes_back, self._register_again]
        steps += [memory.put_back for memory in self._memories]
        steps += [held.put_back for held in self._tensors]
        for step in steps:
            try:
                with torch.no_grad():
                    step()
            except Exception as error:
                failed.append(error)
        if failed:
            raise BatchNormError(
                f"what the model's forward changed cannot be put back, in {len(failed)} places: {failed[0]}"
            ) from failed[0]

    def _put_modes_back(self) -> None:
        for module, training in self._modes:
            if module.training != training:
                module.training = training

    def _register_again(self) -> None:
        for held, name, tensor in self._registered:
            if held.get(name) is not tensor:
                held[name] = tensor


class _Structure:
    """Classes, attributes and registrations of modules."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before = [(module, type(module), dict(vars(module)), _contents(module)) for module in modules]

    def put_back(self) -> None:
        for module, cls, attributes, contents in self._before:
            if type(module) is not cls:
                module.__class__ = cls
            # In place: handles of hooks refer to these very dicts.
            for container, items in ((vars(module), attributes), *contents):
                if not _is_same(container, items):
                    container.clear()
                    container.update(items)


class _Memory:
    """The memory of one or more tensors."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._storage, self._size = storage, storage.nbytes()
        self._before: torch.UntypedStorage = storage.clone()  # type: ignore[no-untyped-call]

    def put_back(self) -> None:
        if self._storage.nbytes() != self._size:
            self._storage.resize_(self._size)
        if not torch.equal(_as_bytes(self._storage), _as_bytes(self._before)):
            self._storage.copy_(self._before)


class _Held:
    """A tensor: its memory and layout; its values where it has no memory of its own."""

    def __init__(self, tensor: Tensor, memories: dict[Any, _Memory]) -> None:
        self._tensor, self._learns = tensor, tensor.requires_grad
        self._before = tensor.detach()
        self._version, self._values = 0, None
        if tensor.layout is not torch.strided:
            self._version, self._values = tensor._version, self._before.clone()
        elif tensor.untyped_storage().device.type != "meta":
            storage = tensor.untyped_storage()
            if storage._cdata not in memories:
                memories[storage._cdata] = _Memory(storage)

    def put_back(self) -> None:
        if self._form(self._tensor) != self._form(self._before):
            self._tensor.data = self._before
        if self._values is not None and self._tensor._version != self._version:
            self._tensor.copy_(self._values)
        if self._tensor.requires_grad != self._learns:
            self._tensor.requires_grad = self._learns

    @staticmethod
    def _form(tensor: Tensor) -> tuple[Any, ...]:
        form = (tensor.layout, tensor.dtype, tensor.device, tensor.shape)
        if tensor.layout is not torch.strided:
            return form
        return (*form, tensor.stride(), tensor.storage_offset(), tensor.untyped_storage()._cdata)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    kinds: tuple[type[Any], ...] = (dict, set)
    values = list(vars(module).values())
    return [(value, kind(value)) for value in values for kind in kinds if isinstance(value, kind)]


def _is_same(now: Any, before: Any) -> bool:
    """Whether two dicts hold the same objects in the same order, or two sets."""
    if isinstance(before, set):
        return bool(now == before)
    return list(now) == list(before) and all(now[key] is value for key, value in before.items())


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _is_managed(model: nn.Module) -> bool:
    """Whether torch.distributed replaces and tracks the parameters around forwards."""
    classes = {base for module in model.modules() for base in type(module).__mro__}
    return any(
        base.__module__.startswith(("torch.distributed", "torch.nn.parallel")) for base in classes
    ) or any(is_traceable_wrapper_subclass(tensor) for tensor in (*model.parameters(), *model.buffers()))
