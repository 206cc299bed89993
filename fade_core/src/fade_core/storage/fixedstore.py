"""The packed tokens of a layer whose buffers never move: tile ``n`` of a row and head has one place for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.errors import CheckpointError, InputError
from fade_core.interfaces import Tier
from fade_core.packed import Packed
from fade_core.storage.codec import Codec
from fade_core.storage.tier_store import DeviceBook, TierStore, Tokens
from fade_core.support.transfer import sent


class TileView:
    """Packed tiles in place, as attention reads them: fields ``[B, H_kv, tiles, ...]`` and how many a row and head uses.

    Args:
        tier: name and quantizers.
        keys: fields of the keys by name.
        values: fields of the values.
        used: int32 ``[B, H_kv]`` on the device: tiles in use; those after them hold anything.
        dtype: dtype that decoding gives back.
    """

    def __init__(
        self, tier: Tier, keys: Mapping[str, Tensor], values: Mapping[str, Tensor], used: Tensor, dtype: torch.dtype
    ) -> None:
        self.tier, self.keys, self.values, self.used, self.dtype = tier, dict(keys), dict(values), used, dtype
        self.tile, (self.heads, self.tiles) = tier.keys.tile, next(iter(keys.values())).shape[1:3]

    def first(self, tiles: int) -> TileView:
        """The first ``tiles`` of every row and head, views."""
        keys, values = ({n: f[:, :, :tiles] for n, f in side.items()} for side in (self.keys, self.values))
        return TileView(self.tier, keys, values, self.used, self.dtype)

    def packed(self) -> tuple[Packed, Packed]:
        """All tokens, views."""
        return self.packed_keys(), self.packed_values()

    def kernel_fields(self, side: str) -> dict[str, Tensor]:
        """Fields ``[B, H_kv, tiles, ...]`` of "k" or "v"."""
        return self.keys if side == "k" else self.values

    def packed_keys(self) -> Packed:
        """All keys, views."""
        return Packed(self.keys, self.tiles * self.tile, self.dtype)

    def packed_values(self) -> Packed:
        """All values, views."""
        return Packed(self.values, self.tiles * self.tile, self.dtype)

    def device_book(self) -> DeviceBook:
        """No table: tiles follow one another."""
        return DeviceBook(None, self.used, None)


@dataclass(frozen=True)
class _Before:
    """Tiles in use, where they begin and what was known of their tokens, at one moment."""

    per_head: Tensor
    first: Tensor
    statistics: dict[str, Tensor]


class FixedStore(TierStore):
    """Tiles of one tier in buffers of one size, filled from the front; all heads of a row are alike.

    Rows hold whole tiles of consecutive positions. What is past ``per_head`` is free to be written over, so that a crop
    or an undone pass only changes that number. The host's book has a copy on the device, ``used``, which decode steps
    change alone.

    Args:
        tier: name and quantizers.
        batch: rows ``B``.
        heads: KV heads ``H_kv``.
        device: where tokens live.
        dtype: dtype that decoding gives back.
        max_tiles: tiles a row and head has room for.
        codec: how tokens are packed and unpacked.
        explicit: whether heads keep tokens of their own (``EvictingStore``).
        statistics: tracked statistics to keep a token (``EvictingStore``).

    Attributes:
        per_head: tiles in use, int64 ``[B, H_kv]`` on the CPU.
        first: position of each row's first packed token, int64 ``[B]`` on the CPU.
    """

    def __init__(
        self,
        tier: Tier,
        batch: int,
        heads: int,
        device: torch.device,
        dtype: torch.dtype,
        max_tiles: int,
        codec: Codec | None = None,
        explicit: bool = False,
        statistics: tuple[str, ...] = (),
    ) -> None:
        self.max_tiles = max_tiles
        self._before: _Before | None = None
        super().__init__(tier, batch, heads, device, dtype, explicit, statistics, codec)

    def _forget(self, batch: int) -> None:
        lead = (batch, self.heads, self.max_tiles)
        self.fields = {
            name: torch.zeros((*lead, *shape), dtype=dtype, device=self.device)
            for name, (shape, dtype) in self._shapes().items()
        }
        self.used = torch.zeros(lead[:2], dtype=torch.int32, device=self.device)
        self.offsets = torch.empty((batch, self.heads, 0, self.tile), dtype=torch.int32, device=self.device)
        self.statistics = {}
        self.first = torch.zeros(batch, dtype=torch.long)
        self._pool_is_fields()
        self.occupy(torch.zeros(lead[:2], dtype=torch.long))

    def kernel_fields(self, side: str) -> dict[str, Tensor]:
        return self.side(side)

    def side(self, name: str) -> dict[str, Tensor]:
        """Fields ``[B, H_kv, max_tiles, ...]`` of "k" or "v" by the quantizer's names."""
        return {field[2:]: tensor for field, tensor in self.fields.items() if field[0] == name}

    def occupy(self, per_head: Tensor, first: Tensor | None = None) -> None:
        """Say on the host how many tiles each row and head uses, int64 ``[B, H_kv]``, and where each row's begin."""
        self.per_head = per_head
        self.first = self.first if first is None else first
        batch, slots = len(per_head), torch.arange(self.max_tiles)
        live, longest = slots < per_head[..., None], int(per_head.max()) if batch else 0
        ids = torch.arange(batch * self.heads * self.max_tiles).view(batch, self.heads, self.max_tiles)
        starts = self.first[:, None, None] + slots * self.tile
        self.table = ids.masked_fill(~live, -1)[..., :longest]
        self.counts = (live * self.tile)[..., :longest]
        self.starts = starts.expand_as(ids)[..., :longest]
        self._book_changed()

    def publish(self) -> None:
        """Write the host's book to the device."""
        self.used.copy_(sent(self.per_head, self.device))

    def clear(self) -> None:
        """Hold no token."""
        self.occupy(torch.zeros_like(self.per_head))
        self.publish()

    # --- what is here ---
    @property
    def alike(self) -> bool:
        return True

    def valid(self) -> Tensor | None:
        if bool((self.per_head == self.tiles).all()):
            return None
        slots = torch.arange(self.tiles * self.tile)
        return sent(slots < (self.per_head * self.tile)[..., None], self.device)

    def packed_keys(self) -> Packed:
        return self._part("k", slice(0, self.tiles))

    def packed_values(self) -> Packed:
        return self._part("v", slice(0, self.tiles))

    def device_book(self) -> DeviceBook:
        return DeviceBook(None, self.used, None)

    def decode_into(self, keys: Tensor, values: Tensor) -> None:
        block = max(4, -(-self.tiles // 8))
        for first in range(0, self.tiles, block):
            tiles = slice(first, min(first + block, self.tiles))
            part = slice(tiles.start * self.tile, tiles.stop * self.tile)
            keys[:, :, part] = self.codec.decode(self.tier.keys, self._part("k", tiles))
            values[:, :, part] = self.codec.decode(self.tier.values, self._part("v", tiles))

    def decode_tile(self, row: int, number: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[1, H_kv, tile, D]`` of one tile of a row."""
        at = {side: {n: f[row : row + 1, :, number : number + 1] for n, f in self.side(side).items()} for side in "kv"}
        keys, values = (Packed(at[side], self.tile, self.dtype) for side in "kv")
        return self.codec.decode(self.tier.keys, keys), self.codec.decode(self.tier.values, values)

    def tensors(self) -> dict[str, Tensor]:
        held = {**self.fields, "table": self.table, "counts": self.counts, "starts": self.starts}
        return held | {"device.used": self.used, "per_head": self.per_head, "first": self.first}

    # --- moving tokens ---
    def append(self, tokens: Tokens, index: Tensor | None = None) -> None:
        """Encode whole tiles behind what is here. Raises ``InputError`` if there is no room for them."""
        per_row = tokens.counts[:, 0] // self.tile
        if index is not None or bool((tokens.counts != (per_row * self.tile)[:, None]).any()):
            raise InputError("tiles of fixed places take whole tiles of consecutive tokens, the same in every head")
        after = self.per_head + per_row[:, None]
        self._check_room(after)
        new = int(per_row.max())
        block = max(4, -(-new // 8))
        for start in range(0, new, block):
            part = slice(start * self.tile, min(start + block, new) * self.tile)
            encoded = {"k": self.codec.encode(self.tier.keys, tokens.keys[:, :, part])}
            encoded["v"] = self.codec.encode(self.tier.values, tokens.values[:, :, part])
            self._write(encoded, start, per_row)
        fresh = tokens.positions[:, 0, 0].cpu() if tokens.first is None else tokens.first[:, 0]
        self.occupy(after, torch.where(self.per_head[:, 0] > 0, self.first, fresh))

    def _check_room(self, after: Tensor) -> None:
        if int(after.max()) > self.max_tiles:
            raise InputError(f"{int(after.max())} tiles are wanted and {self.max_tiles} fit; raise max_cache_len")

    def _write(self, encoded: Mapping[str, Packed], start: int, per_row: Tensor) -> None:
        tiles = next(iter(encoded["k"].fields.values())).shape[2]
        row, number = (torch.arange(start, start + tiles) < per_row[:, None]).nonzero(as_tuple=True)
        at, slot, source = (sent(t, self.device) for t in (row, self.per_head[row, 0] + start + number, number))
        for side, packed in encoded.items():
            for name, field in packed.fields.items():
                held = self.fields[f"{side}.{name}"]
                held[at, :, slot] = field[at, :, source].to(held.dtype)

    def split(self, moving: Tensor, decode: bool = True) -> Tokens | None:
        raise InputError("tokens of fixed places cannot be moved or evicted; create the cache without max_cache_len")

    def crop(self, end: int) -> None:
        """Forget every tile that reaches position ``end`` or further, whole."""
        kept = (end - self.first).div(self.tile, rounding_mode="floor").clamp_min(0)
        self.occupy(torch.minimum(self.per_head, kept[:, None]))

    def select_rows(self, index: Tensor) -> None:
        at, index = sent(index, self.device), index.cpu()
        if len(index) == len(self.per_head):
            tiles = self.tiles
            for field in self.fields.values():
                field[:, :, :tiles] = field[at, :, :tiles]
        else:
            self.fields = {name: field[at] for name, field in self.fields.items()}
            self.used = self.used[at]
            self.offsets = self.offsets[at]
            self._pool_is_fields()
        self.occupy(self.per_head[index], self.first[index])

    # --- undoing a forward pass ---
    def hold(self) -> None:
        self._before = _Before(self.per_head, self.first, {n: t.clone() for n, t in self.statistics.items()})

    def let_go(self) -> None:
        self._before = None

    def go_back(self) -> None:
        if self._before is not None:
            before, self._before = self._before, None
            self.occupy(before.per_head, before.first)
            for name, held in self.statistics.items():
                held.copy_(before.statistics[name])

    # --- state for checkpoints ---
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave. Raises ``CheckpointError`` for tokens that such a store cannot hold."""
        table, counts, starts = (state[name].cpu() for name in ("table", "counts", "starts"))
        per_head = (counts[:, :1] > 0).sum(-1).expand(-1, self.heads).contiguous()
        live = torch.arange(table.shape[2]) < per_head[..., None]
        first = starts[:, 0, 0] if table.shape[2] else torch.zeros_like(per_head[:, 0])
        there = first[:, None, None] + torch.arange(table.shape[2]) * self.tile
        whole = torch.equal(counts, live * self.tile) and bool((starts == there)[live].all())
        if not whole or table.shape[2] > self.max_tiles:
            raise CheckpointError(
                f"a cache of fixed size holds up to {self.max_tiles} whole tiles a row, one after the other; what was "
                "saved is something else: load it into a cache without max_cache_len"
            )
        self._load_fields(state, table, live)
        self.occupy(per_head, first)

    def _load_fields(self, state: Mapping[str, Tensor], table: Tensor, live: Tensor) -> None:
        for name, field in self.fields.items():
            tiles = state[f"pool.{name}"].to(self.device)
            if table.shape[2]:
                field[:, :, : table.shape[2]][live.to(self.device)] = tiles[table[live].to(self.device)]

    # --- inside ---
    def _part(self, side: str, tiles: slice) -> Packed:
        fields = {name: field[:, :, tiles] for name, field in self.side(side).items()}
        return Packed(fields, (tiles.stop - tiles.start) * self.tile, self.dtype)

    def _pool_is_fields(self) -> None:
        """Show the fields to whoever looks into a pool (checkpoints): the same memory."""
        self.pool.fields = {name: field.flatten(0, 2) for name, field in self.fields.items()}
        self.pool.capacity = next(iter(self.pool.fields.values())).shape[0]

    def _release(self) -> None:
        return
