"""What follows a norm on an example: for forwards with control flow, which are no graph."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm.models.norms.activations import module_activation
from batchnorm.models.norms.find import all_names
from batchnorm.models.verify import call, restored, set_mode

from .plan import Plan, unfit


def add_recorded(decided: Plan, model: nn.Module, example: Any) -> None:
    """Add the norms whose output goes to one activation module only, on an example in both modes."""
    names = all_names(model)
    open_norms = [
        found.module for found in decided.norms if found.module not in decided.fuses_with and not unfit(found)
    ]
    if not open_norms:
        return
    taken = set(decided.pairs.values())
    seen = []
    for training in (False, True):
        recorder = _Recorder(model)
        try:
            with restored(model), torch.no_grad():
                set_mode(model, training)
                recorder.run(model, example)
        except Exception:
            if not training:
                raise
            break  # a model that cannot run in training has one mode; the comparison says so
        seen.append(recorder)
    for norm in open_norms:
        acts = {recorder.only_reader(norm) for recorder in seen}
        act = acts.pop() if len(acts) == 1 else None
        if act is None and "pass example=" in decided.reasons[norm]:
            decided.reasons[norm] = seen[-1].in_words(norm)
        if act is None or act in taken or len(names[act]) > 1:
            continue
        taken.add(act)
        decided.pairs[norm] = act
        decided.fuses_with[norm] = f"{module_activation(act)} (as on the example)"
        decided.reasons.pop(norm, None)


@dataclass
class _Output:
    """What a norm returned: kept alive, so that its memory is not another tensor's later."""

    tensor: Tensor
    version: int
    readers: list[Any] = field(default_factory=list)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes who reads the output of each norm, before anything writes into it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        self.norms = norms
        self.acts = [module for module in model.modules() if module_activation(module) is not None]
        self.outputs: dict[int, _Output] = {}  # by storage
        self.of: dict[nn.Module, list[_Output]] = {norm: [] for norm in norms}
        self.called: Counter[nn.Module] = Counter()
        self._inside = 0

    def run(self, model: nn.Module, example: Any) -> None:
        with self._listening(), self:
            outputs = call(model, example)
        self._read(outputs, "the model's output")

    def only_reader(self, norm: nn.Module) -> nn.Module | None:
        """Return the activation module that alone reads what `norm` returns, each called once."""
        outputs = self.of[norm]
        if len(outputs) != 1 or len(outputs[0].readers) != 1:
            return None
        (reader,) = outputs[0].readers
        return reader if isinstance(reader, nn.Module) and self.called[reader] == 1 else None

    def in_words(self, norm: nn.Module) -> str:
        """Why `only_reader` returns None."""
        outputs = self.of[norm]
        if len(outputs) != 1:
            return f"it is called {len(outputs)} times on the example"
        readers = outputs[0].readers
        if len(readers) != 1:
            return f"on the example its output is read {len(readers)} times"
        (reader,) = readers
        name = f"{type(reader).__name__}, which is shared" if isinstance(reader, nn.Module) else reader
        return f"on the example its output goes to {name}"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._inside:
            self._read((args, kwargs), str(func))
        return func(*args, **(kwargs or {}))

    def _read(self, values: Any, reader: Any) -> None:
        for leaf in pytree.tree_leaves(values):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided:
                output = self.outputs.get(leaf.untyped_storage()._cdata)
                if output is not None and leaf._version == output.version:
                    output.readers.append(reader)

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        handles = []
        for norm in self.norms:
            handles.append(norm.register_forward_pre_hook(self._norm_begins, with_kwargs=True))
            handles.append(norm.register_forward_hook(self._norm_ends))
        for act in self.acts:
            handles.append(act.register_forward_pre_hook(self._act_begins, with_kwargs=True))
            handles.append(act.register_forward_hook(self._act_ends))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _norm_begins(self, _norm: nn.Module, args: Any, kwargs: Any) -> None:
        self._read((args, kwargs), "a norm")  # a kernel of ours reads memory without an operator of torch
        self._inside += 1

    def _norm_ends(self, norm: nn.Module, _args: Any, result: Any) -> None:
        self._inside -= 1
        if isinstance(result, Tensor):
            output = _Output(result, result._version)
            self.outputs[result.untyped_storage()._cdata] = output
            self.of[norm].append(output)

    def _act_begins(self, act: nn.Module, args: Any, kwargs: Any) -> None:
        self.called[act] += 1
        self._read((args, kwargs), act)
        self._inside += 1

    def _act_ends(self, _act: nn.Module, _args: Any, _result: Any) -> None:
        self._inside -= 1
