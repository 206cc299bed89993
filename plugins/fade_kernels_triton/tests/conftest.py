from __future__ import annotations

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when kernels are defined
torch.set_num_threads(1)


def _release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version(package).split(".")[:2])


def _missing() -> str:
    """Why kernels cannot run here; empty if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.is_available():
        return ""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "no CUDA device, and Triton was imported before its interpreter could be asked for"
    if _release("triton") < (3, 7) and _release("numpy") >= (2, 4):
        return f"the interpreter of Triton {version('triton')} does not work with NumPy {version('numpy')}"
    return ""


@pytest.fixture
def device() -> str:
    """Where kernels run here: a CUDA device, or the CPU by way of Triton's interpreter."""
    if reason := _missing():
        pytest.skip(reason)
    return "cuda" if torch.cuda.is_available() else "cpu"
