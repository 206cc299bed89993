"""Whether Triton kernels run on a device, and why not."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

DTYPES = (torch.float16, torch.bfloat16)
CAPABILITY = (8, 0)
"""Compute capability from which the tensor cores take what the kernels give them."""

OVERLAP_CAPABILITY = (9, 0)
"""Compute capability from which a launch can start before the one that it waits for ends."""


def interpreted() -> bool:
    """Whether Triton was told to interpret kernels on the CPU (``TRITON_INTERPRET=1`` before it is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def gpu_name(device: torch.device) -> str:
    """Name of a CUDA device, such as "NVIDIA H200"; empty for other devices."""
    return str(torch.cuda.get_device_name(device)) if device.type == "cuda" else ""


@cache
def overlaps(device: torch.device) -> bool:
    """Whether a launch can start before the one that it waits for ends (compute capability 9.0 and up)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= OVERLAP_CAPABILITY


def unusable(device: torch.device) -> str:
    """Why Triton kernels cannot run on ``device``; empty if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed (CUDA builds of torch bring it; pip install 'fade-kernels-triton[cuda]')"
    if interpreted():
        return "" if device.type == "cpu" else f"TRITON_INTERPRET=1 runs kernels on the CPU, not on {device.type}"
    if device.type != "cuda":
        return f"needs a CUDA device; this is {device.type}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "needs a CUDA device and a CUDA build of torch; torch finds none here"
    found = torch.cuda.get_device_capability(device)
    if found < CAPABILITY:
        return f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}; {device} has {found[0]}.{found[1]}"
    return ""
