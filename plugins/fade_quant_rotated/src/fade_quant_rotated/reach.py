"""Positions further on than what was read, which codes are to serve too."""

from __future__ import annotations

from functools import lru_cache
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


class Turns:
    """Averages of second moments over ``rotations`` ``[O, D, D]`` (float64).

    A rotary embedding turns channels in pairs: then all rotations together are four factors an element.

    Attributes:
        mean: float64 ``[D, D]``, the mean rotation.
    """

    def __init__(self, rotations: Tensor) -> None:
        self.mean = rotations.mean(0)
        own = rotations.diagonal(dim1=1, dim2=2)  # [O, D]
        others = rotations - torch.diag_embed(own)
        self._partner = others.abs().amax(0).argmax(-1)  # [D]
        other = others.gather(2, self._partner.expand(len(others), -1)[..., None])[..., 0]  # [O, D]
        both = torch.cat([own, other], -1)
        self._factors = (both.T @ both / len(own)).unflatten(0, (2, -1)).unflatten(2, (2, -1))  # [2, D, 2, D]
        self._each = rotations if bool((others.count_nonzero(-1) > 1).any()) else None  # more than pairs

    def average(self, square: Tensor) -> Tensor:
        """The mean of ``R square R^T`` over the rotations ``R``, for ``[H, D, D]``."""
        if self._each is not None:
            return sum((turn @ square @ turn.T for turn in self._each), torch.zeros_like(square)) / len(self._each)
        rows = torch.stack([square, square[:, self._partner]], 1)  # [H, 2, D, D]
        both = torch.stack([rows, rows[..., self._partner]], 3)  # [H, 2, D, 2, D]
        found: Tensor = (both * self._factors).sum((1, 3))
        return found


class _Scheme:
    """A scheme that equals those which turn keys of ``dim`` channels as it does.

    Each prompt brings new objects, but turns by one position and by all of ``reach`` are the same, and so are those between.
    """

    def __init__(self, rope: RopeScheme, dim: int, reach: int) -> None:
        axes, by = torch.eye(dim).expand(1, 2, -1, -1), torch.tensor([1, reach])
        self.rope, self._turned = rope, rope.shift(axes, by[None, :, None]).numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Scheme) and self._turned == other._turned

    def __hash__(self) -> int:
        return hash(self._turned)


def turns_of(rope: RopeScheme, dim: int, device: torch.device, reach: int = REACH) -> Turns:
    """``Turns`` over ``rotations``, made once for all layers and prompts alike."""
    return _turns(_Scheme(rope, dim, reach), dim, device, reach)


@lru_cache(maxsize=8)
def _turns(scheme: _Scheme, dim: int, device: torch.device, reach: int) -> Turns:
    return Turns(rotations(scheme.rope, dim, device, reach))
