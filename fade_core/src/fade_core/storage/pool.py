"""Tiles of packed tokens, addressed by id. A tile is written once before it is freed, so rows and beams may share it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fade_core.support.transfer import sent

_GROWTH = 32  # a full pool grows by at least 1/32 of its size


class TilePool:
    """Storage of one tier of one layer: every field is ``[capacity, *tile_shape]``.

    The pool keeps no record of who uses a tile: callers pass the ids that are alive, and what is not among them is free.

    Args:
        shapes: tile shape and dtype of each field.
        device: where the fields live.
    """

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> None:
        self.fields = {
            name: torch.zeros((0, *shape), dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }
        self.capacity = 0
        self.device = device

    def write(self, tiles: Mapping[str, Tensor], alive: Tensor, wish: Tensor | None = None) -> Tensor:
        """Store ``[n, ...]`` tiles and return their ids (int64, CPU); ``alive`` and ``wish`` (the first) as for ``take``."""
        ids = self.take(torch.arange(len(next(iter(tiles.values())))) if wish is None else wish, alive)
        target = sent(ids, self.device)
        for name, field in self.fields.items():
            field[target] = tiles[name].to(field.device, field.dtype)
        return ids

    def take(self, wish: Tensor, alive: Tensor) -> Tensor:
        """Ids (int64 ``[n]``, CPU) of tiles that are not ``alive``; the pool grows if there are too few.

        Args:
            wish: ids ``[n]``, all different, that are given where they are free.
            alive: ids in use; -1 is no id.
        """
        missing = len(wish) - len(self.free(alive))
        if missing > 0:
            self.grow(self.capacity + max(missing, self.capacity // _GROWTH))
        free = self.free(alive)
        granted = torch.isin(wish, free)
        others = free[~torch.isin(free, wish[granted])]
        return wish.masked_scatter(~granted, others)

    def read(self, ids: Tensor) -> dict[str, Tensor]:
        """Fields ``[n, ...]`` of the tiles ``ids`` (int64 ``[n]``, CPU)."""
        source = sent(ids, self.device)
        return {name: field.index_select(0, source) for name, field in self.fields.items()}

    def keep(self, ids: Tensor) -> None:
        """Keep the tiles ``ids`` (int64, CPU) alone: tile ``ids[i]`` is ``i`` from here on."""
        self.fields, self.capacity = self.read(ids), len(ids)

    def free(self, alive: Tensor) -> Tensor:
        """Ids that are not among ``alive``, int64 on the CPU, ascending."""
        used = torch.zeros(self.capacity, dtype=torch.bool)
        used[alive[alive >= 0].long()] = True
        return (~used).nonzero().flatten()

    def grow(self, capacity: int, source: Tensor | None = None, target: Tensor | None = None) -> None:
        """Replace the fields by larger ones.

        Args:
            capacity: tiles of the new fields.
            source: ids (int64, CPU) of the tiles that are kept; ``None`` for all, at their ids.
            target: their ids in the new fields.
        """
        old, new = (slice(self.capacity) if ids is None else sent(ids, self.device) for ids in (source, target))
        for name, field in self.fields.items():
            grown = torch.zeros((capacity, *field.shape[1:]), dtype=field.dtype, device=field.device)
            grown[new] = field[old]
            self.fields[name] = grown
        self.capacity = capacity


def numbered(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each of ``ids`` ``[n]`` once, in the order in which they are first met, and the number of each entry's, ``[n]``."""
    found, place = torch.unique(ids, return_inverse=True)
    first = torch.full_like(found, len(ids)).scatter_reduce(0, place, torch.arange(len(ids)), "amin")
    order = torch.argsort(first)
    return found[order], torch.argsort(order)[place]
