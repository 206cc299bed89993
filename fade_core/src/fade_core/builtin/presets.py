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
    "kernels for CUDA and for CPUs",
    "README",
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
    "kernels for CUDA and for CPUs",
    "README",
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
    "kernels for CUDA and for CPUs",
    "README",
)
PRESETS = [SAFE, BALANCED, AGGRESSIVE]
