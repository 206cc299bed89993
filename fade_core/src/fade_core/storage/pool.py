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

    def write(self, tiles: Mapping[str, Tensor], alive: Tensor) -> Tensor:
        """Store ``[n, ...]`` tiles and return their ids (int64, CPU). ``alive`` holds the ids in use; -1 is no id."""
        ids = self.take(next(iter(tiles.values())).shape[0], alive)
        self.put(ids, tiles)
        return ids

    def put(self, ids: Tensor, tiles: Mapping[str, Tensor]) -> None:
        """Write ``[n, ...]`` tiles to ``ids`` (int64 ``[n]``, CPU), which the caller owns."""
        target = sent(ids, self.device)
        for name, field in self.fields.items():
            field[target] = tiles[name].to(field.dtype)

    def take(self, count: int, alive: Tensor, wish: Tensor | None = None) -> Tensor:
        """Ids (int64 ``[count]``, CPU) of tiles that are not ``alive``; the pool grows if there are too few.

        Args:
            count: tiles wanted.
            alive: ids in use; -1 is no id.
            wish: ids ``[count]``, all different, that are given where they are free.
        """
        self.reserve(count, alive)
        free = self.free(alive)
        if wish is None:
            return free[:count]
        granted = torch.isin(wish, free)
        others = free[~torch.isin(free, wish[granted])]
        return wish.masked_scatter(~granted, others)

    def reserve(self, count: int, alive: Tensor) -> None:
        """Make room for ``count`` more tiles beside those ``alive``."""
        missing = count - len(self.free(alive))
        if missing > 0:
            self.grow(self.capacity + max(missing, self.capacity // _GROWTH))

    def read(self, ids: Tensor, prefix: str = "") -> dict[str, Tensor]:
        """Fields ``[*ids.shape, ...]`` of the tiles ``ids`` (int64, on the pool's device), of names with ``prefix``."""
        flat = ids.flatten()
        return {
            name: field.index_select(0, flat).unflatten(0, ids.shape)
            for name, field in self.fields.items()
            if name.startswith(prefix)
        }

    def keep(self, ids: Tensor) -> None:
        """Keep the tiles ``ids`` (int64, CPU) alone: tile ``ids[i]`` is ``i`` from here on."""
        source = sent(ids, self.device)
        self.fields = {name: field.index_select(0, source) for name, field in self.fields.items()}
        self.capacity = len(ids)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by field name."""
        return dict(self.fields)

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
        for name, field in self.fields.items():
            grown = torch.zeros((capacity, *field.shape[1:]), dtype=field.dtype, device=field.device)
            if source is None or target is None:
                grown[: self.capacity] = field
            else:
                grown[sent(target, self.device)] = field.index_select(0, sent(source, self.device))
            self.fields[name] = grown
        self.capacity = capacity
