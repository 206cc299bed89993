"""Tiles of packed tokens, addressed by id. A tile is written once and never changed, so rows and beams may share it."""

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
            name: torch.empty((0, *shape), dtype=dtype, device=device) for name, (shape, dtype) in shapes.items()
        }
        self.capacity = 0
        self.device = device

    def write(self, tiles: Mapping[str, Tensor], alive: Tensor) -> Tensor:
        """Store ``[n, ...]`` tiles and return their ids (int64, CPU). ``alive`` holds the ids in use; -1 is no id."""
        count = next(iter(tiles.values())).shape[0]
        self.reserve(count, alive)
        ids = self._free(alive)[:count]
        target = sent(ids, self.device)
        for name, field in self.fields.items():
            field[target] = tiles[name].to(field.dtype)
        return ids

    def reserve(self, count: int, alive: Tensor) -> None:
        """Make room for ``count`` more tiles beside those ``alive``."""
        missing = count - len(self._free(alive))
        if missing > 0:
            self._resize(self.capacity + max(missing, self.capacity // _GROWTH))

    def read(self, ids: Tensor, prefix: str = "") -> dict[str, Tensor]:
        """Fields ``[*ids.shape, ...]`` of the tiles ``ids`` (int64, on the pool's device), of names with ``prefix``."""
        flat = ids.flatten()
        return {
            name: field.index_select(0, flat).unflatten(0, ids.shape)
            for name, field in self.fields.items()
            if name.startswith(prefix)
        }

    def compact(self, alive: Tensor, slack: float = 0.25) -> Tensor | None:
        """Drop dead tiles if more than ``slack`` of the pool is dead.

        Returns:
            int64 ``[capacity]`` mapping old ids to new ones, or ``None`` if nothing moved.
        """
        used = torch.unique(alive[alive >= 0])
        if len(used) >= self.capacity * (1 - slack):
            return None
        mapping = torch.full((self.capacity,), -1, dtype=torch.long)
        mapping[used] = torch.arange(len(used))
        source = sent(used, self.device)
        self.fields = {name: field.index_select(0, source) for name, field in self.fields.items()}
        self.capacity = len(used)
        return mapping

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by field name."""
        return dict(self.fields)

    def _free(self, alive: Tensor) -> Tensor:
        used = torch.zeros(self.capacity, dtype=torch.bool)
        used[alive[alive >= 0]] = True
        return (~used).nonzero().flatten()

    def _resize(self, capacity: int) -> None:
        for name, field in self.fields.items():
            grown = torch.empty((capacity, *field.shape[1:]), dtype=field.dtype, device=field.device)
            grown[: self.capacity] = field
            self.fields[name] = grown
        self.capacity = capacity
