"""Tensors of one row and head after another, which grow, shrink and change rows together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

_STATISTIC = "statistic."


@dataclass(frozen=True)
class TokenLayout:
    """What the window and the tiers of a layer keep of a token, and where.

    Attributes:
        heads: KV heads ``H_kv``.
        dtype: of keys and values in full precision.
        device: where tokens live.
        statistics: tracked statistics to keep a token.
        shifted: whether each token carries how far it is moved when it is read (contiguous re-positioning).
    """

    heads: int
    dtype: torch.dtype
    device: torch.device
    statistics: tuple[str, ...] = ()
    shifted: bool = False

    def notes(self, shape: tuple[int, ...]) -> dict[str, Tensor]:
        """Zeros for the numbers that each of ``shape`` tokens carries: float32 "statistic.NAME", int32 "shift"."""
        kinds = {_STATISTIC + name: torch.float32 for name in self.statistics}
        kinds |= {"shift": torch.int32} if self.shifted else {}
        return {name: torch.zeros(shape, dtype=kind, device=self.device) for name, kind in kinds.items()}


def under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those of ``tensors`` whose name begins with ``prefix``, by the rest of the name."""
    return {name.removeprefix(prefix): held for name, held in tensors.items() if name.startswith(prefix)}


def picked(held: Tensor, index: Tensor) -> Tensor:
    """The slots ``index`` (int64 ``[B, H or 1, n]``) of ``held`` ``[B, H or 1, slots, ...]``: ``[B, H or 1, n, ...]``."""
    heads, rest = max(held.shape[1], index.shape[1]), held.shape[3:]
    wide = index.view(*index.shape, *(1 for _ in rest)).expand(-1, heads, -1, *rest)
    return held.expand(-1, heads, -1, *rest).gather(2, wide)


def left_pack(chosen: Tensor) -> Tensor:
    """Indices that bring the true entries of bool ``[..., N]`` to the front, their order kept."""
    return torch.argsort(~chosen, dim=-1, stable=True)


def by_position(chosen: Tensor, positions: Tensor) -> Tensor:
    """Indices that bring the true entries of bool ``[..., N]`` to the front, in order of ``positions``."""
    return torch.argsort(positions.masked_fill(~chosen, torch.iinfo(positions.dtype).max), dim=-1, stable=True)


def joined(slots: int, fill: int, *parts: tuple[Tensor, int]) -> Tensor:
    """The rows of all parts, one below the other, in one new tensor.

    Args:
        slots: that each row has room for.
        fill: what slots hold that nothing was copied to.
        parts: tensors ``[B, H, S, ...]``, and how many slots of each are copied.
    """
    rows, like = [len(held) for held, _ in parts], parts[0][0]
    both = like.new_full((sum(rows), like.shape[1], slots, *like.shape[3:]), fill)
    for place, (held, kept) in zip(both.split(rows), parts, strict=True):
        place[:, :, :kept] = held[:, :, :kept]
    return both


class Slots:
    """Named tensors ``[B, H_kv or 1, slots, ...]``; one that keeps its shape keeps its place.

    Args:
        tensors: by name.
        fills: by name, what empty slots hold; 0 where it is not said.
    """

    def __init__(self, tensors: Mapping[str, Tensor], fills: Mapping[str, int] | None = None) -> None:
        self.tensors, self.fills = dict(tensors), fills or {}

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def statistics(self, slots: int | None = None) -> dict[str, Tensor]:
        """The tracked statistics ``[B, H, tokens]`` of the first ``slots`` slots, by name; views."""
        return {name: held[:, :, :slots].flatten(2) for name, held in under(self.tensors, _STATISTIC).items()}

    def select_rows(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was; ``index`` lies where the tensors do."""
        stays = all(len(held) == len(index) for held in self.tensors.values())
        chosen = ((name, held, held[index]) for name, held in self.tensors.items())
        self.tensors = {name: held.copy_(new) if stays else new for name, held, new in chosen}

    def resize(self, slots: int, kept: int, *below: tuple[Slots, int]) -> None:
        """Room for ``slots`` slots a row.

        Args:
            slots: that each row has afterwards.
            kept: leading ones that stay.
            below: others whose rows are put behind one's own, and how many of their slots are copied.
        """
        self.tensors = {
            name: joined(slots, self.fills.get(name, 0), (held, kept), *((other[name], n) for other, n in below))
            for name, held in self.tensors.items()
        }

    def move(self, index: Tensor) -> None:
        """Slot ``i`` becomes what slot ``index[b, h, i]`` was, in place; those after them stay as they are."""
        for held in self.tensors.values():
            held[:, :, : index.shape[2]] = picked(held, index)
