"""Positions further on than what was read, which codes are to serve too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fade_core.interfaces import RopeScheme

REACH = 8192
"""Positions further on that codes serve where the model was trained that far."""

OFFSETS = 96
"""Distances that moments are averaged over. They grow by the fourth power: every answer has near ones, few have far ones."""


def reach_of(config: Any, wanted: int | None = None) -> int:
    """Positions to calibrate for: ``wanted``, by default ``REACH``, but no more than the model was trained at.

    Args:
        config: the text part of a model's configuration.
        wanted: positions.
    """
    trained = int(getattr(config, "max_position_embeddings", 0) or 0)
    return min(REACH if wanted is None else wanted, trained or REACH)


def distances(count: int, reach: int, device: torch.device) -> Tensor:
    """``count`` offsets from 0 to ``reach``, int64: as ``OFFSETS`` says."""
    return (torch.linspace(0, 1, count, device=device).double() ** 4 * reach).round().long()


def rotations(rope: RopeScheme, dim: int, device: torch.device, reach: int = REACH) -> Tensor:
    """How ``rope`` turns a key of ``dim`` channels that comes ``0 <= offset <= reach`` positions later, ``[OFFSETS, D, D]``.

    ``rotations[i] @ key`` is the key at offset ``i``; float64. All are the identity for keys that carry no position.
    """
    axes = torch.eye(dim, device=device).expand(1, OFFSETS, -1, -1)  # [1, OFFSETS, D, D]
    return rope.shift(axes, distances(OFFSETS, reach, device)[None, :, None]).double()[0].transpose(-1, -2)


def turned_apart(rope: RopeScheme, keys: Tensor, reach: int, generator: torch.Generator) -> Tensor:
    """Keys ``[N, D]`` as if each came at a distance of its own, of those that ``rotations`` averages over."""
    order = torch.randperm(len(keys), generator=generator).to(keys.device)
    by = distances(len(keys), reach, keys.device)[order]
    return rope.shift(keys[None, None], by[None, None])[0, 0]
