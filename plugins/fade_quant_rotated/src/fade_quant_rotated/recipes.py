"""What ``fade eval quality`` measures of this distribution: rotated, self-calibrated and, given a file, calibrated formats."""

from __future__ import annotations

from fade_core.interfaces import Recipe

BITS = (4.5, 3.5, 2.5, 2.1, 1.65)
"""Average bits an element that a calibration is asked for, everything counted."""

LEARNT = ((4.75, 4.25), (3.75, 3.25), (3.5, 2.75), (2.75, 2.25), (2.35, 1.85))
"""Bits of keys and of values that are asked for where each prompt is its own calibration."""

TURBO = "random rotation and Lloyd-Max codes, arXiv 2504.19874"


def recipes(calibration: str | None = None) -> list[Recipe]:
    """Rotated and self-calibrated recipes, and those of a calibration file that ``fade calibrate`` wrote."""
    found = [
        *(
            Recipe(f"Hadamard int{bits}", rotated(bits, bits, codes="uniform"), "Hadamard, uniform codes")
            for bits in (4, 3)
        ),
        *(Recipe(f"TurboQuant {bits}", rotated(bits, bits, codes="lloyd-max"), TURBO) for bits in (4, 3, 2)),
        *(
            Recipe(
                f"rotated K{keys}V2",
                rotated(keys, 2, codes="lloyd-max", metadata="log8"),
                "no calibration, 8-bit scales",
            )
            for keys in (4, 3)
        ),
    ]
    found += [
        Recipe(
            f"self-calibrated K{keys} V{values}",
            {"keys": {"kind": "self-calibrated", "bits": keys}, "values": {"kind": "self-calibrated", "bits": values}},
            "learnt from each prompt, no file",
        )
        for keys, values in LEARNT
    ]
    if calibration:
        found += [Recipe(f"calibrated {bits}", calibrated(calibration, bits), "fade calibrate") for bits in BITS]
        layout = calibrated(calibration, 2.1, widths=[0, 2, 4, 6, 8], levels="uniform")
        found.append(Recipe("calibrated 2.1, even widths", layout | {"tile": 128}, "as kernels read them"))
    return found


def rotated(key_bits: int, value_bits: int, **fields: object) -> dict[str, object]:
    """Fields of a ``FadeConfig`` with rotated keys and values."""
    return {
        "keys": {"kind": "rotated", "bits": key_bits, **fields},
        "values": {"kind": "rotated", "bits": value_bits, **fields},
    }


def calibrated(file: str, bits: float, **fields: object) -> dict[str, object]:
    """Fields of a ``FadeConfig`` that averages ``bits`` over keys and values of all layers."""
    side = {"kind": "calibrated", "file": file, "bits": bits, **fields}
    return {"keys": side, "values": side}
