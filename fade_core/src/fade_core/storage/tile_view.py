"""Packed tiles as attention reads them: in place where they lie in runs, through the table elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fade_core.interfaces import Tier
from fade_core.packed import Packed


@dataclass(eq=False)
class TileView:
    """The tiles of a tier in use; nothing is copied before somebody asks for them. Numbers are int32 on the tokens' device.

    Attributes:
        tier: name and quantizers.
        fields: pool fields ``[N, ...]`` by side and name, such as "k.codes4".
        ids: ``[B, H_kv, T]``, the used ones first.
        used: ``[B, H_kv]``: tiles in use; those after them may hold anything.
        counts: ``[B, H_kv, T]``, live tokens of each tile; ``None`` if used ones are full.
        runs: whether ids are ``(b * H_kv + h) * T + n``.
        dtype: dtype that decoding gives back.
        tiles: tiles of each row and head to read.
        even: whether every row and head is known to use that many.
    """

    tier: Tier
    fields: Mapping[str, Tensor]
    ids: Tensor
    used: Tensor
    counts: Tensor | None
    runs: bool
    dtype: torch.dtype
    tiles: int
    even: bool = False

    def in_use(self) -> TileView:
        """No more tiles than are in use; their number is read on the host."""
        tiles = int(self.used.max())
        return replace(self, tiles=tiles, even=tiles == int(self.used.min()))

    @property
    def tile(self) -> int:
        """Tokens of a tile."""
        return self.tier.keys.tile

    @property
    def heads(self) -> int:
        """KV heads."""
        return self.ids.shape[1]

    @property
    def table(self) -> Tensor | None:
        """The ids, for kernels to read; ``None`` where tiles lie in runs."""
        return None if self.runs else self.ids

    def packed_keys(self, at: slice | Tensor | None = None) -> Packed:
        """Keys of tiles, fields ``[B, H_kv, n, ...]``.

        Args:
            at: a slice of the tiles of every row and head, with both ends, or pool ids, int64 ``[b, H_kv, n]``; all tiles
                by default.
        """
        return self._side("k", at)

    def packed_values(self, at: slice | Tensor | None = None) -> Packed:
        """Values, as ``packed_keys``."""
        return self._side("v", at)

    def packed(self) -> tuple[Packed, Packed]:
        """Keys and values of all tiles."""
        return self.packed_keys(), self.packed_values()

    def _side(self, side: str, at: slice | Tensor | None) -> Packed:
        at = slice(0, self.tiles) if at is None else at
        if isinstance(at, slice) and self.runs and self.even:
            found = {name: field[:, :, at] for name, field in self.kernel_fields(side).items()}
        else:
            ids = self.pool_ids()[:, :, at] if isinstance(at, slice) else at
            pool, flat = self.pool_fields(side), ids.flatten()
            found = {name: field.index_select(0, flat).unflatten(0, ids.shape) for name, field in pool.items()}
        tiles = at.stop - at.start if isinstance(at, slice) else at.shape[2]
        return Packed(found, tiles * self.tile, self.dtype)

    def pool_ids(self) -> Tensor:
        """Pool ids, int64 ``[B, H_kv, tiles]``; a row's and head's first one in place of what it does not use.

        That may hold anything. Where a row and head uses none at all, any tile in use.
        """
        live = torch.arange(self.tiles, device=self.ids.device) < self.used[..., None]
        spare = self.ids[:, :, :1].where(self.used[..., None] > 0, self.ids.new_full((), -1))
        spare = spare.where(spare >= 0, spare.amax()).clamp_min(0).long()
        return self.ids[:, :, : self.tiles].long().where(live, spare)

    def valid(self) -> Tensor | None:
        """bool ``[B, H_kv, tiles * tile]`` of live tokens; ``None`` if every slot is known to be live."""
        if self.even and self.counts is None:
            return None
        numbers = torch.arange(self.tiles, device=self.used.device)
        counts = self.tile if self.counts is None else self.counts[:, :, : self.tiles]
        live = (numbers < self.used[..., None]) * counts  # [B, H_kv, tiles]
        slots = torch.arange(self.tile, device=self.used.device)
        valid = (slots < live[..., None]).flatten(2)
        return None if valid.device.type == "cpu" and bool(valid.all()) else valid

    def kernel_fields(self, side: str) -> dict[str, Tensor]:
        """Fields of "k" or "v": the pool ``[N, ...]`` if there is a ``table``, else ``[B, H_kv, T, ...]``."""
        pool, lead = self.pool_fields(side), self.ids.shape
        return {n: f[: lead.numel()].unflatten(0, lead) for n, f in pool.items()} if self.runs else pool

    def pool_fields(self, side: str) -> dict[str, Tensor]:
        """Pool fields ``[N, ...]`` of "k" or "v"."""
        return {name[2:]: field for name, field in self.fields.items() if name[0] == side}
