"""`--weights`: checkpoint files, which are not trusted."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.commands import assert_fails, built, run


class Malicious:
    """A checkpoint that makes a file as soon as it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_checkpoint_that_would_run_code_is_refused(own: Path) -> None:
    ran = own.with_name("it-ran")
    weights = own.with_name("bad.pt")
    torch.save({"state_dict": built(own, "net").state_dict(), "extra": Malicious(ran)}, weights)
    done = run("inspect", f"{own}:net", "--weights", weights)
    assert_fails(done, 1, "bad.pt is not read", "might run code")
    assert not ran.exists()
    torch.load(weights, weights_only=False)  # it would have run
    assert ran.exists()


def test_weights_of_every_form_and_wrong_ones(own: Path) -> None:
    state = built(own, "net").state_dict()
    state["2.weight"] = torch.zeros(4)
    plain, nested, tensors = (own.with_name(name) for name in ("plain.pth", "nested.ckpt", "w.safetensors"))
    torch.save(state, plain)
    torch.save({"state_dict": state, "epoch": 3}, nested)
    save_file(state, tensors)
    for weights in (plain, nested, tensors):
        done = run("inspect", f"{own}:net", "--weights", weights)
        assert "dead weight (4 of 4)" in done.stdout, done.output
    wrong = own.with_name("wrong.pt")
    for content, parts in (
        ({"0.weight": torch.ones(3)}, ["wrong.pt", "Missing key"]),
        ({"epoch": 3}, ["wrong.pt: it holds no state"]),
        ([torch.ones(3)], ["wrong.pt: it holds no state"]),
    ):
        torch.save(content, wrong)
        assert_fails(run("inspect", f"{own}:net", "--weights", wrong), 1, *parts)
    save_file({"0.weight": torch.ones(3)}, own.with_name("few.safetensors"))
    done = run("inspect", f"{own}:net", "--weights", own.with_name("few.safetensors"))
    assert_fails(done, 1, "few.safetensors", "Missing key")
    for name in ("text.safetensors", "text.pt"):
        own.with_name(name).write_text("no weights at all, only words")
        assert_fails(run("inspect", f"{own}:net", "--weights", own.with_name(name)), 1, name)
        done = run("inspect", f"{own}:net", "--weights", own.with_name(f"no-{name}"))
        assert_fails(done, 1, f"no-{name}", "No such file")


class Zeros:
    """A checkpoint that takes 10 GB of memory as soon as it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return (bytearray, (10**10,))


def _saved(content: object, *, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def _state(**changed: object) -> dict[Any, object]:
    return {"weight": torch.ones(3), "bias": torch.zeros(3), **changed}


def _scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def _compressed() -> bytes:
    """A checkpoint of 40 MB in 40 kB."""
    with zipfile.ZipFile(io.BytesIO(_saved({"weight": torch.zeros(10_000_000)}))) as archive:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as other:
            for member in archive.infolist():
                other.writestr(member.filename, archive.read(member))
    return buffer.getvalue()


def _quantized() -> torch.Tensor:
    return torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)


def _header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


_HUGE = b'{"w":{"dtype":"F32","shape":[9999999999,99999],"data_offsets":[0,3999999959600001]}}'
FILES: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "empty zip": ("w.pt", lambda: b"", "is not read, as damaged"),
    "empty safetensors": ("w.safetensors", lambda: b"", "is not read, as damaged"),
    "cut zip": ("w.pt", lambda: _saved(_state())[:-30], "is not read, as damaged"),
    "cut legacy": ("w.pt", lambda: _saved(_state(), legacy=True)[:-2], "is not read, as damaged"),
    "zeros": ("w.pt", lambda: bytes(500), "is not read"),
    "a scripted model": ("w.pt", _scripted, "is not read"),
    "a compressed zip": ("w.pt", _compressed, "its members are compressed"),
    "10 GB of zeros": ("w.pt", lambda: _saved(Zeros()), "it makes a bytearray"),
    "10 GB of zeros, legacy": ("w.pt", lambda: _saved(Zeros(), legacy=True), "it makes a bytearray"),
    "an index": ("w.safetensors.index.json", lambda: b'{"weight_map": {}}', "is not read"),
    "a header of no end": ("w.safetensors", lambda: (2**62).to_bytes(8, "little") + b"{}", "is not read"),
    "a huge tensor": ("w.safetensors", lambda: _header(_HUGE), "is not read"),
    "a deep header": ("w.safetensors", lambda: _header(b"[" * 100_000), "is not read"),
    "int keys": ("w.pt", lambda: _saved({0: torch.ones(3)}), "its keys are names, and one is '0'"),
    "a key of bytes": ("w.pt", lambda: _saved({b"weight": torch.ones(3)}), "its keys are names"),
    "a number": ("w.pt", lambda: _saved(_state(bias=3)), "holds no state: a dict of tensors"),
    "a state of a state": ("w.pt", lambda: _saved({"model": _state()}), "holds no state: a dict of tensors"),
    "an int": ("w.pt", lambda: _saved(3), "holds no state"),
    "complex": ("w.pt", lambda: _saved(_state(bias=torch.ones(3) * 1j)), "bias is torch.complex64"),
    "a float counter": ("w.pt", lambda: _saved(_state(num_batches_tracked=torch.tensor(0.5))), "convert it"),
    "sparse": ("w.pt", lambda: _saved(_state(bias=torch.ones(3).to_sparse())), "bias is torch.sparse_coo"),
    "meta": ("w.pt", lambda: _saved(_state(bias=torch.ones(3, device="meta"))), "bias is on the meta device"),
    "quantized": ("w.pt", lambda: _saved(_state(bias=_quantized())), "bias is quantized: save it as a plain"),
    "another shape": ("w.pt", lambda: _saved(_state(bias=torch.ones(4))), "size mismatch for bias"),
    "safetensors of complex": (
        "w.safetensors",
        lambda: safetensors.torch.save({"bias": torch.ones(3) * 1j}),
        "bias is torch.complex64",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # torch's own, of what it will do another day
@pytest.mark.parametrize("kind", FILES)
def test_weights_that_are_none_are_one_line(own: Path, kind: str) -> None:
    own.write_text(own.read_text() + "\n\ndef single():\n    return nn.BatchNorm1d(3)\n")
    name, content, part = FILES[kind]
    own.with_name(name).write_bytes(content())
    done = run("inspect", f"{own}:single", "--weights", own.with_name(name))
    assert_fails(done, 1, name, part)
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_weights_that_are_no_regular_file_are_not_read(own: Path) -> None:
    os.mkfifo(own.with_name("pipe.safetensors"))
    for path in (own.parent, own.with_name("pipe.safetensors"), Path("/dev/zero")):
        done = run("inspect", f"{own}:net", "--weights", path)
        assert_fails(done, 1, f"{path} cannot be read: ")


def test_shared_tensors_are_loaded_from_every_format(own: Path) -> None:
    state = {name: value + 1 for name, value in built(own, "tied").state_dict().items()}
    torch.save(state, own.with_name("w.pt"))
    save_file(state, own.with_name("both.safetensors"))
    del state["1.weight"]
    save_file(state, own.with_name("one.safetensors"))
    out = own.with_name("out.safetensors")
    for name in ("w.pt", "both.safetensors", "one.safetensors"):
        weights = own.with_name(name)
        done = run("convert", f"{own}:tied", "--weights", weights, "--out", out, "--force")
        assert done.exit_code == 0, done.output
        assert torch.equal(safetensors.torch.load_file(out)["1.weight"], state["3.weight"]), name


@pytest.mark.parametrize(
    "shape",
    ["99999999x99999999", "4294967296x4294967296x4", "9" * 18 + "x9", "9" * 5000 + "x9", "9x" * 400 + "9"],
)
def test_an_input_beyond_all_memory_is_refused(own: Path, shape: str) -> None:
    done = run("inspect", f"{own}:net", "--input", shape)
    assert_fails(done, 2, "--input ")


def test_numbers_beyond_all_data_are_all_of_it(own: Path) -> None:
    options = ("--samples", 10**30, "--batch-size", 10**30, "--out", own.with_name("x.safetensors"))
    done = run("calibrate", f"{own}:net", "--data", f"{own}:data", *options)
    assert "on 40 samples in 1 batches" in done.stdout, done.output
