"""Packed tiles as attention reads them: in place where they lie in runs, through the table elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

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
        slots: of tiles and tokens by name, as in ``TileTable``: "starts" or "positions", and the notes.
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
    slots: Mapping[str, Tensor] = field(default_factory=dict)

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

    def packed_keys(self) -> Packed:
        """Keys of all tiles."""
        return self._side("k")

    def packed_values(self) -> Packed:
        """Values of all tiles."""
        return self._side("v")

    def packed(self, ids: Tensor | None = None) -> tuple[Packed, Packed]:
        """Keys and values of all tiles, or of the pool tiles ``ids`` (int64 ``[b, H_kv, n]``)."""
        return self._side("k", ids), self._side("v", ids)

    def _side(self, side: str, ids: Tensor | None = None) -> Packed:
        if ids is None and self.runs and self.even:
            found = {name: held[:, :, : self.tiles] for name, held in self.kernel_fields(side).items()}
        else:
            ids = self.pool_ids() if ids is None else ids
            pool = self.pool_fields(side)
            found = {n: held.index_select(0, ids.flatten()).unflatten(0, ids.shape) for n, held in pool.items()}
        return Packed(found, (self.tiles if ids is None else ids.shape[2]) * self.tile, self.dtype)

    def pool_ids(self) -> Tensor:
        """Pool ids, int64 ``[B, H_kv, tiles]``; for those not in use the row's and head's first, or else any that is."""
        live = torch.arange(self.tiles, device=self.ids.device) < self.used[..., None]
        spare = self.ids[:, :, :1].where(self.used[..., None] > 0, self.ids.new_full((), -1))
        spare = spare.where(spare >= 0, spare.amax()).clamp_min(0).long()
        return self.ids[:, :, : self.tiles].long().where(live, spare)

    def positions(self) -> Tensor:
        """Positions of the tokens of all tiles, int64 ``[B, H_kv, tiles * tile]``."""
        if "positions" in self.slots:
            return self.slots["positions"][:, :, : self.tiles].flatten(2).long()
        starts = self.slots["starts"][:, :, : self.tiles, None].long()
        return (starts + torch.arange(self.tile, device=starts.device)).flatten(2)

    def valid(self) -> Tensor | None:
        """bool ``[B, H_kv, tiles * tile]`` of live tokens; ``None`` if every slot is known to be live."""
        if self.even and self.counts is None:
            return None
        live = torch.arange(self.tiles, device=self.used.device) < self.used[..., None]  # [B, H_kv, tiles]
        live = live * (self.tile if self.counts is None else self.counts[:, :, : self.tiles])
        slots = torch.arange(self.tile, device=self.used.device)
        valid = (slots < live[..., None]).flatten(2)
        return None if valid.device.type == "cpu" and bool(valid.all()) else valid

    def kernel_fields(self, side: str) -> dict[str, Tensor]:
        """Fields of "k" or "v": the pool ``[N, ...]`` if there is a ``table``, else ``[B, H_kv, T, ...]``."""
        pool, lead = self.pool_fields(side), self.ids.shape
        return {n: held[: lead.numel()].unflatten(0, lead) for n, held in pool.items()} if self.runs else pool

    def pool_fields(self, side: str) -> dict[str, Tensor]:
        """Pool fields ``[N, ...]`` of "k" or "v"."""
        return {name[2:]: field for name, field in self.fields.items() if name[0] == side}
