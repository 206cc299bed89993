"""Presets of codes that learn from the prompt, in the layout that kernels read."""

from __future__ import annotations

from typing import Any

from fade_core.interfaces import Preset


def _self_calibrated(keys: float, values: float, widths: list[int]) -> dict[str, Any]:
    shared = {"kind": "self-calibrated", "widths": widths, "group": 16, "levels": "uniform"}
    return {"tile": 128, "keys": shared | {"bits": keys}, "values": shared | {"bits": values}}


COMPACT = Preset(
    "compact",
    _self_calibrated(2.4, 1.8, [0, 2, 4]),
    "2.1 bits, learnt from each prompt: no file; nothing evicted",
    "kernels for CUDA and for CPUs",
    "README of fade-quant-rotated",
)
FAITHFUL = Preset(
    "faithful",
    _self_calibrated(4.8, 4.2, [0, 2, 4, 6, 8]),
    "4.5 bits, learnt from each prompt: answers as without compression; nothing evicted",
    "kernels for CUDA and for CPUs",
    "README of fade-quant-rotated",
)
PRESETS = [COMPACT, FAITHFUL]
