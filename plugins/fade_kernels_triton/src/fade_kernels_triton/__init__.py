"""Triton kernels over FADE's packed KV cache. Names are imported on first use; Triton when a kernel first runs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fade_kernels_triton.kernel import TritonDecodeAttention
    from fade_kernels_triton.parity import ParityReport, check_fused_parity
    from fade_kernels_triton.sdpa import fused_int4_sdpa, int4_sdpa

_HOME = {
    "ParityReport": "parity",
    "TritonDecodeAttention": "kernel",
    "check_fused_parity": "parity",
    "fused_int4_sdpa": "sdpa",
    "int4_sdpa": "sdpa",
}
"""Public name to the module that defines it."""

__all__ = ["ParityReport", "TritonDecodeAttention", "check_fused_parity", "fused_int4_sdpa", "int4_sdpa"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value
