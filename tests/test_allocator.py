"""`batchnorm.reuse_memory`: large blocks stay with the process."""

from __future__ import annotations

import platform

import pytest

import batchnorm
from tests.support.programs import run_python

FAULTS = """
import resource, sys
import torch
import batchnorm

if sys.argv[1] == "reuse":
    assert batchnorm.reuse_memory()

def step():
    blocks = [torch.ones(2**24) for _ in range(3)]  # 64 MB each: glibc's own threshold grows to 32

for _ in range(8):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    return int(run_python("-c", FAULTS, how))


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc's allocator")
def test_large_blocks_are_used_again() -> None:
    assert page_faults("reuse") < page_faults("default") / 10


def test_elsewhere_it_says_why_it_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    with pytest.warns(UserWarning, match="glibc's allocator, and this is Darwin"):
        assert not batchnorm.reuse_memory()
