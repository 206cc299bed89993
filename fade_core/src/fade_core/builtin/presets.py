"""The presets that the core brings: what each trades is measured in the README."""

from __future__ import annotations

from fade_core.interfaces import Preset

SAFE = Preset(
    "safe",
    {
        "n_sink": 4,
        "recent_window": 64,
        "keys": {"kind": "uniform", "bits": 4, "axis": "channel"},
        "values": {"kind": "uniform", "bits": 4, "axis": "token"},
        "policy": {"kind": "position"},
    },
    "K and V at 4 bits, nothing evicted: the defaults",
    "kernels; GPU 7.85 ms a step (StaticCache 26.50), CPU 1.04 times DynamicCache",
    "KL 0.0019, SmolLM2-135M, 24 texts; H200, 8 x 8,192, and two cores, 2,048 tokens: README.md",
)
BALANCED = Preset(
    "balanced",
    {
        "n_sink": 4,
        "recent_window": 64,
        "keys": {"kind": "uniform", "bits": 3, "axis": "channel"},
        "values": {"kind": "uniform", "bits": 2, "axis": "token", "group": 32},
        "policy": {"kind": "position"},
    },
    "K at 3 bits, V at 2, nothing evicted",
    "kernels; GPU 8.54 ms a step (StaticCache 26.50), CPU 1.04 times DynamicCache",
    "KL 0.0191, SmolLM2-135M, 24 texts; H200, 8 x 8,192, and two cores, 2,048 tokens: README.md",
)
AGGRESSIVE = Preset(
    "aggressive",
    {
        "n_sink": 4,
        "recent_window": 64,
        "keys": {"kind": "uniform", "bits": 3, "axis": "channel"},
        "values": {"kind": "uniform", "bits": 2, "axis": "token"},
        "policy": {"kind": "h2o", "budget": 0.5},
    },
    "K at 3 bits, V at 2, half of the context evicted",
    "kernels; GPU 8.95 ms a step, rankings in (StaticCache 26.50), CPU 1.10 times DynamicCache",
    "KL 0.058, SmolLM2-135M, 24 texts; H200, 8 x 8,192, and two cores, 2,048 tokens: README.md",
)
PRESETS = [SAFE, BALANCED, AGGRESSIVE]
