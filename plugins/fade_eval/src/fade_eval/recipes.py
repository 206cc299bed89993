"""The core's own entries in ``fade eval quality``: what needs no rotation and no calibration."""

from __future__ import annotations

from fade_core.interfaces import Recipe


def _uniform(bits: int, key_axis: str = "token") -> dict[str, object]:
    return {
        "keys": {"kind": "uniform", "bits": bits, "axis": key_axis},
        "values": {"kind": "uniform", "bits": bits, "axis": "token"},
    }


def _kivi(bits: int) -> dict[str, object]:
    side = {"kind": "kivi", "bits": bits}
    return {"keys": side, "values": side}


RECIPES: tuple[Recipe, ...] = (
    *(Recipe(f"int{bits} a token", _uniform(bits), "one scale a token") for bits in (8, 4, 3, 2)),
    Recipe("int4, keys a channel", _uniform(4, "channel"), "one scale a tile and channel for keys: preset safe"),
    *(Recipe(f"KIVI {bits}", _kivi(bits), "groups of 32, arXiv 2402.02750") for bits in (4, 3, 2)),
)
