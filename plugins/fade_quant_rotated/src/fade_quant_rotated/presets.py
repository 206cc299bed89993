"""Presets of codes that learn from the prompt, in the layout that kernels read."""

from __future__ import annotations

from typing import Any

from fade_core.interfaces import Preset


def _self_calibrated(keys: float, values: float) -> dict[str, Any]:
    # Rows hold whole planes, 32 bits a token over all heads of a layer: with these bits little of one is lost where a layer has
    # 128 channels, 192, or 512 and more.
    shared = {"kind": "self-calibrated", "widths": [0, 2, 4, 6, 8], "levels": "uniform"}
    return {"tile": 128, "keys": shared | {"bits": keys}, "values": shared | {"bits": values}}


COMPACT = Preset(
    "compact",
    _self_calibrated(2.41, 1.82),
    "2.1 bits, learnt from each prompt: no file; nothing evicted",
    "kernels; GPU 6.81 ms a step (StaticCache 26.50), CPU 1.58 times DynamicCache",
    "KL 0.0036, SmolLM2-135M, 8 texts: README.md of the plugin; H200, 8 x 8,192, and two cores: README.md",
)
FAITHFUL = Preset(
    "faithful",
    _self_calibrated(4.82, 4.2),
    "4.5 bits, learnt from each prompt: answers as without compression; nothing evicted",
    "kernels; not timed",
    "KL 0.0002, SmolLM2-135M, 8 texts: README.md of the plugin",
)
PRESETS = [COMPACT, FAITHFUL]
