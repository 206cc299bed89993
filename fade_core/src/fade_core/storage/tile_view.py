"""Packed tiles as attention reads them: in place where they lie in runs, through the table elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.interfaces import Tier
from fade_core.packed import Packed


@dataclass(frozen=True)
class DeviceTable:
    """The table as kernels read it: int32, on the tokens' device.

    Attributes:
        table: pool ids ``[B, H_kv, T]``, the used ones first; ``None`` if tile ``n`` of row ``b`` and head ``h`` is
            ``(b * H_kv + h) * T + n``.
        used: tiles in use, ``[B, H_kv]``.
        counts: live tokens of each tile, ``[B, H_kv, T]``; ``None`` if every used tile is full.
    """

    table: Tensor | None
    used: Tensor
    counts: Tensor | None


class TileView:
    """The tiles of a tier in use; nothing is copied before somebody asks for them.

    Args:
        tier: name and quantizers.
        fields: pool fields ``[N, ...]`` by side and name, such as "k.codes4".
        ids: int32 ``[B, H_kv, T]``.
        used: int32 ``[B, H_kv]``: tiles in use; those after them may hold anything.
        counts: int32 ``[B, H_kv, T]``, live tokens of each tile; ``None`` if used ones are full.
        runs: whether ids are ``(b * H_kv + h) * T + n``.
        dtype: dtype that decoding gives back.
        tiles: tiles of each row and head to read; the whole table by default.
        even: whether every row and head is known to use that many.
    """

    def __init__(
        self,
        tier: Tier,
        fields: Mapping[str, Tensor],
        ids: Tensor,
        used: Tensor,
        counts: Tensor | None,
        runs: bool,
        dtype: torch.dtype,
        tiles: int | None = None,
        even: bool = False,
    ) -> None:
        self.tier, self.fields, self.ids, self.used, self.counts = tier, fields, ids, used, counts
        self.runs, self.dtype, self.even = runs, dtype, even
        self.tile, self.heads = tier.keys.tile, ids.shape[1]
        self.tiles = ids.shape[2] if tiles is None else tiles
        self._first = 0
        self._chosen: Tensor | None = None

    def part(self, tiles: slice) -> TileView:
        """Tiles ``tiles`` of every row and head."""
        view = self._like(tiles.stop - tiles.start)
        view._first = self._first + tiles.start
        return view

    def chosen(self, order: Tensor) -> TileView:
        """Tiles ``order`` (int64 ``[B, H_kv, n]``) of each row and head."""
        view = self._like(order.shape[2])
        view._chosen = self._tiles().gather(2, order)
        return view

    def rows(self, at: Tensor) -> TileView:
        """The rows ``at`` (int64)."""
        view = self._like(self.tiles)
        view._chosen = self._tiles()[at]
        return view

    def _like(self, tiles: int) -> TileView:
        return TileView(
            self.tier, self.fields, self.ids, self.used, self.counts, self.runs, self.dtype, tiles, self.even
        )

    def packed(self) -> tuple[Packed, Packed]:
        """All tokens: fields ``[B, H_kv, tiles, ...]``."""
        return self.packed_keys(), self.packed_values()

    def packed_keys(self) -> Packed:
        """All keys."""
        return self._side("k.")

    def packed_values(self) -> Packed:
        """All values."""
        return self._side("v.")

    def _side(self, side: str) -> Packed:
        named = {name[2:]: field for name, field in self.fields.items() if name.startswith(side)}
        if self.runs and self.even and self._chosen is None:
            part = slice(self._first, self._first + self.tiles)
            lead = self.ids.shape
            found = {n: f[: lead.numel()].unflatten(0, lead)[:, :, part] for n, f in named.items()}
        else:
            ids = self._tiles()
            flat = ids.flatten()
            found = {n: f.index_select(0, flat).unflatten(0, ids.shape) for n, f in named.items()}
        return Packed(found, self.tiles * self.tile, self.dtype)

    def _tiles(self) -> Tensor:
        """Pool ids, int64; a row's and head's first one in place of what it does not use: that may hold anything.

        Where it uses none at all, any tile in use.
        """
        if self._chosen is not None:
            return self._chosen
        part = slice(self._first, self._first + self.tiles)
        ids = self.ids[:, :, part].long()
        live = torch.arange(part.start, part.stop, device=ids.device) < self.used[..., None]
        spare = self.ids[:, :, :1].where(self.used[..., None] > 0, self.ids.new_full((), -1))
        spare = spare.where(spare >= 0, spare.amax()).clamp_min(0).long()
        return ids.where(live, spare)

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

    # --- what kernels read ---
    def kernel_fields(self, side: str) -> dict[str, Tensor]:
        """Fields of "k" or "v": the pool ``[N, ...]`` if ``device_book`` has a table, else ``[B, H_kv, T, ...]``."""
        named = {name[2:]: field for name, field in self.fields.items() if name[0] == side}
        if not self.runs:
            return named
        lead = self.ids.shape
        return {name: field[: lead.numel()].unflatten(0, lead) for name, field in named.items()}

    def device_book(self) -> DeviceTable:
        """The table, where tiles do not lie in runs."""
        return DeviceTable(None if self.runs else self.ids, self.used, self.counts)
