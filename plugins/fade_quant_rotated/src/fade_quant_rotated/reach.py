"""Positions further on than what was read, which a calibration is to serve too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fade_core.interfaces import RopeScheme

REACH = 8192
"""Positions that a file serves where the model was trained that far: further ones cost bits at every length."""

_STEADY = {"default", "linear", "yarn", "llama3", "proportional"}
"""Kinds of RoPE whose frequencies do not depend on the length."""

_GOLDEN = 0.6180339887498949


def reach_of(config: Any, wanted: int | None = None) -> int:
    """Positions to calibrate for: ``wanted``, by default ``REACH``, or as many as the model was trained at; 0 without RoPE.

    A model whose positions are learnt, or whose frequencies change with the length, is not the same model further on: its texts
    stay where they are.

    Args:
        config: the text part of a model's configuration.
        wanted: positions.
    """
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found] if "rope_type" in found else [part for part in found.values() if isinstance(part, dict)]
    if not kinds or any(kind.get("rope_type", "default") not in _STEADY for kind in kinds):
        return 0
    trained = int(getattr(config, "max_position_embeddings", 0) or 0)
    return min(REACH if wanted is None else wanted, trained or REACH)


OFFSETS = 96
"""Distances that moments are averaged over. They grow by the fourth power: every answer has near ones, few have far ones."""


def rotations(rope: RopeScheme, dim: int, device: torch.device, reach: int = REACH) -> Tensor:
    """How ``rope`` turns a key of ``dim`` channels that comes ``0 <= offset <= reach`` positions later, ``[OFFSETS, D, D]``.

    ``rotations[i] @ key`` is the key at offset ``i``; float64. All are the identity for keys that carry no position.
    """
    offsets = (torch.linspace(0, 1, OFFSETS, device=device).double() ** 4 * reach).round().long()
    axes = torch.eye(dim, device=device).expand(1, OFFSETS, -1, -1)  # [1, OFFSETS, D, D]
    return rope.shift(axes, offsets[None, :, None]).double()[0].transpose(-1, -2)


def places(lengths: Sequence[int], reach: int) -> list[Tensor]:
    """Position ids ``[1, T]`` of each text: wherever it starts, RoPE shows its attention the same distances.

    Starts are spread evenly over what ``reach`` leaves, neighbours far apart, the first at 0.
    """
    starts = [int(number * _GOLDEN % 1 * max(0, reach - length + 1)) for number, length in enumerate(lengths)]
    return [torch.arange(at, at + length)[None] for at, length in zip(starts, lengths, strict=True)]
