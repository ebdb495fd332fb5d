"""Reads and writes the files of the verbs: a model, its weights, data, and the result."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import _remove_duplicate_names, save
from torch import Tensor, nn

from batchnorm.errors import BatchNormError, DataError, OptionError
from batchnorm.files import check_writable, write_whole
from batchnorm.models.mask import mask
from batchnorm.models.state_files import in_short
from batchnorm.studies.data import load_data
from batchnorm.studies.user_code import is_user_code, load_function, naming_the_line, source_of

from .weights import load_weights


class Run:
    """One command on one model.

    Args:
        spec: `file.py:function` or `package.module:function`, which returns the model.
        weights: a file to load into it; None = as the function made it.
        data: as of `study`; None = none.
        data_dir: where MNIST is.
        samples: how many training examples; None = all.
        batch_size: examples per batch, and in the example.
        shape: of an input, as `1x3x224x224`; examples of the data are given it, apart from their number.
        takes_lengths: whether the command calls a model as `model(x, lengths)` on data with padding.
    """

    def __init__(
        self,
        spec: str,
        weights: Path | None,
        data: str | None,
        data_dir: Path | None,
        samples: int | None,
        batch_size: int,
        shape: str | None,
        *,
        takes_lengths: bool = False,
    ) -> None:
        for option, value in (("--samples", samples), ("--batch-size", batch_size)):
            if value is not None and value < 1:
                raise OptionError(f"{option} {value} is below 1")
        self.spec = spec
        self._shape = None if shape is None else _parse_shape(shape)
        self._batch_size = batch_size
        self.model = _build(spec)
        if weights is not None:
            load_weights(self.model, weights)
        self._lengths: Tensor | None = None
        self._inputs = None if data is None else self._load(data, data_dir, samples, takes_lengths)

    def _load(self, data: str, data_dir: Path | None, samples: int | None, takes_lengths: bool) -> Tensor:
        loaded = load_data(data, data_dir, targets="any")
        if loaded.names is not None:
            raise OptionError(f"--data {data} has dicts; this command calls model(x): return (x, y) from it")
        if loaded.lengths_train is not None:
            if not takes_lengths:
                raise OptionError(f"--data {data} has padding, which this command cannot mask")
            if self._shape is not None:
                raise OptionError(f"--data {data} has padding: its shape is told by the data, not by --input")
            self._lengths = torch.from_numpy(loaded.lengths_train)
        inputs, self._labels = torch.from_numpy(loaded.x_train), torch.from_numpy(loaded.y_train)
        inputs = inputs[: min(samples or len(inputs), len(inputs))]
        if self._shape is None:
            return inputs
        try:
            return inputs.reshape(len(inputs), *self._shape[1:])
        except RuntimeError:
            raise OptionError(
                f"--input: an example of {data} has shape {list(inputs.shape[1:])}, which is no "
                f"{list(self._shape[1:])}"
            ) from None

    def calibration(self) -> dict[str, Any]:
        """Return what `calibrate` is told of the data: batches, and with padding how the model takes them.

        Padded examples go to the model as in a study, as `model(x, lengths)`, and norms of its positions
        leave the padding out.
        """
        if self._lengths is None:
            return {"data": self.batches()}
        lengths = torch.split(self._lengths[: sum(map(len, self.batches()))], len(self.batches()[0]))

        def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> object:
            with mask(model, lengths=batch[1], size=batch[0].shape[1]):
                return model(*batch)

        return {"data": list(zip(self.batches(), lengths, strict=True)), "forward": forward}

    def batches(self) -> tuple[Tensor, ...]:
        """Return the training examples in batches."""
        assert self._inputs is not None
        return torch.split(self._inputs, min(self._batch_size, len(self._inputs)))

    def diagnosed(self, samples: int) -> dict[str, Any]:
        """Return what `diagnose` is told of the data: batches drawn at random, the same each time.

        Padded examples go to the model as in a study, as `model(x, lengths)`.
        """
        if self._inputs is None:
            return {"example": self.example()}
        x, y, lengths = self._inputs, self._labels, self._lengths
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        parts = torch.split(order[: max(samples, 1)], self._batch_size)
        if lengths is None:
            return {"data": [(x[part], y[part]) for part in parts]}
        return {
            "data": [({"x": x[part], "lengths": lengths[part]}, y[part]) for part in parts],
            "forward": lambda model, batch: model(batch[0]["x"], batch[0]["lengths"]),
            "example": (x[parts[0][:2]], lengths[parts[0][:2]]),
        }

    def example(self, *, needed: bool = False) -> Tensor | None:
        """Return an input of the model: the first batch of data, else random of the shape, else None."""
        if self._inputs is not None:
            # A copy: an exported program keeps its example, and with a view all of the data.
            return self.batches()[0].clone()
        if self._shape is not None:
            return torch.randn(self._shape, generator=torch.Generator().manual_seed(0))
        if needed:
            raise OptionError("exporting a model runs it: give --input SHAPE or --data")
        return None

    def verb(self, verb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a verb on the model; an error of the model's own code names its line of code."""
        with naming_the_line(f"running {self.spec}", source_of(self.spec), kept=BatchNormError):
            return verb(self.model, *args, **kwargs)

    def write(self, model: nn.Module, out: Path, force: bool, example: Tensor | None = None) -> None:
        """Write a model or its state, by the suffix of the file: whole, or not at all."""
        check_out(out, (out.suffix,), force)
        if out.suffix == ".safetensors":
            content = _state_of(model, self.spec)
        else:
            assert example is not None
            with naming_the_line(f"exporting {self.spec}", source_of(self.spec)):
                content = _exported(model, example, out.suffix)
        write_whole(out, content)
        print(f"written: {out}")


def _build(spec: str) -> nn.Module:
    if not is_user_code(spec):
        raise OptionError(f"{spec!r} is no file.py:function or package.module:function")
    function = load_function(spec)
    with naming_the_line(f"building {spec}", source_of(spec)):
        model = function()
    if not isinstance(model, nn.Module):
        raise OptionError(f"{spec} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def check_out(out: Path, suffixes: tuple[str, ...], force: bool, option: str = "--out") -> None:
    """Raise OptionError for a file with another suffix, or one that exists, unless forced.

    Raises:
        FileError: it cannot be written.
    """
    if out.suffix not in suffixes:
        raise OptionError(f"{option} {out}: its name must end in {' or '.join(suffixes)}")
    if out.exists() and not force:
        raise OptionError(f"{option} {out} is there already: --force writes over it")
    check_writable(out)


def check_progress(resume: Path, *others: Path | None) -> None:
    """Raise OptionError if the progress file, which is deleted at the end, is another file of the command.

    Raises:
        FileError: it cannot be written.
    """
    if any(other is not None and other.resolve() == resume.resolve() for other in others):
        raise OptionError(f"--resume {resume} is the name of another file of this command: give it its own")
    check_writable(resume)


def check_exporter(suffix: str) -> None:
    """Raise OptionError for a file that needs packages which are not installed."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if suffix == ".onnx" and missing:
        raise OptionError(f"an .onnx file needs {' and '.join(missing)}: pip install {' '.join(missing)}")


# The content of a file is made in memory: on a full disk, torch's writer ends the process, and the writer of
# safetensors raises errors of its own.


def _state_of(model: nn.Module, spec: str) -> bytes:
    """Return a state as `safetensors.torch.save_model` writes it: of tensors that share memory, one each."""
    state, notes = model.state_dict(), {"format": "pt"}
    try:
        for kept, others in _remove_duplicate_names(state).items():
            notes |= dict.fromkeys(others, kept)
            for name in others:
                del state[name]
        return save({name: value.contiguous() for name, value in state.items()}, notes)
    except (RuntimeError, ValueError, KeyError, AttributeError, safetensors.SafetensorError) as error:
        raise DataError(f"the state of {spec} does not fit into safetensors: {in_short(error)}") from error


def _exported(model: nn.Module, example: Tensor, suffix: str) -> bytes:
    """Return a program of torch.export, or the same as ONNX, with an open batch size where that works."""
    open_batch = ({0: torch.export.Dim.AUTO},)
    program = torch.export.export(model.eval(), (example,), dynamic_shapes=open_batch)
    if suffix == ".pt2":
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        return buffer.getvalue()
    made = torch.onnx.export(program, (), verbose=False)
    assert made is not None
    content: bytes = made.model_proto.SerializeToString()
    return content


def _parse_shape(text: str) -> tuple[int, ...]:
    parts = text.split("x")
    if len(parts) < 2 or not all(part.isdecimal() and len(part) < 20 and int(part) for part in parts):
        raise OptionError(f"--input {text!r} is no shape such as 1x3x224x224")
    shape = tuple(map(int, parts))
    if 4 * math.prod(shape) > _memory():
        raise OptionError(f"--input {text} is a tensor of more bytes than this machine's memory has")
    return shape


def _memory() -> int:
    """Return this machine's memory in bytes; where the system does not tell, more than any machine has."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**43
