"""Loads Triton with its own LLVM, even where another library has made a different LLVM global."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import sys


def load_triton() -> None:
    """Imports Triton, if it is installed, with its own LLVM where another LLVM's symbols are global.

    TensorFlow's wheels (2.20, 2.21) load with RTLD_GLOBAL, and LLVM is in them. Triton's library then takes
    TensorFlow's functions for its own, and ends the process: "LLVM ERROR: inconsistency in registered
    CommandLine options" (Triton 3.9), or a segmentation fault (3.7). Source:
    https://github.com/tensorflow/tensorflow/issues/124205.
    """
    if importlib.util.find_spec("triton") is None:  # partition.py works without it
        return
    own_first = getattr(os, "RTLD_DEEPBIND", 0)  # glibc has it
    if "triton" in sys.modules or not own_first or not _sees_llvm():
        importlib.import_module("triton")
        return
    before = sys.getdlopenflags()
    sys.setdlopenflags(before | own_first)
    try:
        importlib.import_module("triton")
    finally:
        sys.setdlopenflags(before)


def _sees_llvm() -> bool:
    """Returns whether functions of some LLVM are global in this process."""
    return hasattr(ctypes.CDLL(None), "LLVMContextCreate")
