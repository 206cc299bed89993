"""The tokens of one tier of one layer: packed tiles and the book that says whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.interfaces import Tier
from fade_core.packed import Packed
from fade_core.storage.codec import Codec
from fade_core.storage.pool import TilePool
from fade_core.support.transfer import sent


@dataclass
class Tokens:
    """Full-precision tokens on their way between tiers; row ``b`` and head ``h`` hold the first ``counts[b, h]``.

    Attributes:
        keys: ``[B, H_kv, T, D]``.
        values: ``[B, H_kv, T, D]``.
        positions: int64 ``[B, H_kv or 1, T]``, logical positions, ascending.
        counts: int64 ``[B, H_kv]`` on the CPU.
        statistics: name to float32 ``[B, H_kv, T]``.
        first: int64 ``[B, H_kv or 1]`` on the CPU: position of the first token, where those of each row and head are known
            to follow one another; ``None`` where the host would have to ask the device.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    counts: Tensor
    statistics: dict[str, Tensor]
    first: Tensor | None = None


@dataclass(frozen=True)
class DeviceBook:
    """The book as kernels read it: int32, on the tokens' device.

    Attributes:
        table: pool ids ``[B, H_kv, tiles]``, the used ones first; ``None`` if the tiles of a row and head follow one another.
        used: tiles in use, ``[B, H_kv]``.
        counts: live tokens of each tile, ``[B, H_kv, tiles]``; ``None`` if every used tile is full.
    """

    table: Tensor | None
    used: Tensor
    counts: Tensor | None


@dataclass(frozen=True)
class _Book:
    """Whose tiles are whose, at one moment."""

    table: Tensor
    counts: Tensor
    starts: Tensor
    offsets: Tensor
    explicit: bool
    statistics: dict[str, Tensor]


def left_pack(chosen: Tensor) -> Tensor:
    """Indices that bring the true entries of bool ``[..., N]`` to the front, their order kept."""
    return torch.argsort(~chosen, dim=-1, stable=True)


def by_position(chosen: Tensor, positions: Tensor) -> Tensor:
    """Indices that bring the true entries of bool ``[..., N]`` to the front, in order of ``positions``."""
    return torch.argsort(positions.masked_fill(~chosen, torch.iinfo(positions.dtype).max), dim=-1, stable=True)


class TierStore:
    """Packed tokens of one tier: ragged over rows and heads, in whole tiles except where a crop cut one short.

    Each row and head has a list of tiles: pool ids ``table[B, H, n]`` (-1: none) and live tokens ``counts[B, H, n]``, the
    first ``count`` of the tile. Where a quantizer codes ``heads_together``, all heads of a row have tile ``n`` as long as
    one of them has tokens in it. Within a tile positions ascend. Where tokens only ever move by age (``explicit=False``) a
    tile holds consecutive positions and only its first one is kept. These tensors are replaced, never written into (only
    statistics are), so that what ``hold`` remembers stays as it was.

    Args:
        tier: name, capacity and quantizers.
        batch: rows ``B``.
        heads: KV heads ``H_kv``.
        device: where tokens live.
        dtype: dtype that decoding gives back.
        explicit: keep a position for every token.
        statistics: tracked statistics to keep a token.
        codec: how tokens are packed and unpacked.
    """

    def __init__(
        self,
        tier: Tier,
        batch: int,
        heads: int,
        device: torch.device,
        dtype: torch.dtype,
        explicit: bool,
        statistics: tuple[str, ...] = (),
        codec: Codec | None = None,
    ) -> None:
        self.codec = codec if codec is not None else Codec()
        self._ids: Tensor | None = None
        self._valid: Tensor | None = None
        self._alike: bool | None = None
        self._device_book: DeviceBook | None = None
        self.tier, self.device, self.dtype, self.explicit = tier, device, dtype, explicit
        self.tile, self.heads = tier.keys.tile, heads
        self.together = tier.keys.heads_together or tier.values.heads_together
        self.names = statistics
        self.pool = TilePool(self._shapes(), device)
        self._held: _Book | None = None
        self._forget(batch)

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes = {}
        for side, quantizer in (("k", self.tier.keys), ("v", self.tier.values)):
            for name, (shape, dtype) in quantizer.field_shapes().items():
                shapes[f"{side}.{name}"] = (shape, self.dtype if name == "raw" else dtype)
        return shapes

    def _forget(self, batch: int) -> None:
        empty = (batch, self.heads, 0)
        self.table = torch.empty(empty, dtype=torch.long)
        self.counts = torch.empty(empty, dtype=torch.long)
        self.starts = torch.empty(empty, dtype=torch.long)
        self.offsets = torch.empty((*empty, self.tile), dtype=torch.int32, device=self.device)
        self.statistics = {
            name: torch.zeros((*empty, self.tile), dtype=torch.float32, device=self.device) for name in self.names
        }
        self._book_changed()

    # --- what is here ---
    @property
    def tiles(self) -> int:
        """Tiles of the longest row and head."""
        return self.table.shape[2]

    @property
    def lengths(self) -> Tensor:
        """Live tokens, int64 ``[B, H_kv]`` on the CPU."""
        return self.counts.sum(-1)

    def valid(self) -> Tensor | None:
        """bool ``[B, H_kv, tiles * tile]`` of live tokens, or ``None`` if every slot is live."""
        if self._valid is None:
            if bool((self.counts == self.tile).all()):
                return None
            slots = torch.arange(self.tile)
            self._valid = sent((slots < self.counts[..., None]).flatten(2), self.device)
        return self._valid

    def positions(self) -> Tensor:
        """int64 ``[B, H_kv, tiles * tile]``, -1 where there is no token."""
        if self.explicit:
            found = self.offsets.flatten(2).long()
        else:
            found = (sent(self.starts, self.device)[..., None] + torch.arange(self.tile, device=self.device)).flatten(2)
        valid = self.valid()
        return found if valid is None else found.masked_fill(~valid, -1)

    def packed(self) -> tuple[Packed, Packed]:
        """All tokens as ``Packed`` keys and values, fields ``[B, H_kv, tiles, ...]``."""
        return self.packed_keys(), self.packed_values()

    def packed_keys(self) -> Packed:
        """All keys, fields ``[B, H_kv, tiles, ...]``."""
        return self._side("k", self.ids())

    def packed_values(self) -> Packed:
        """All values, fields ``[B, H_kv, tiles, ...]``."""
        return self._side("v", self.ids())

    def ids(self) -> Tensor:
        """The table on the tokens' device, some live tile in place of -1: spare tiles may hold anything, NaN included."""
        if self._ids is None:
            live = self.table.max().clamp_min(0) if self.table.numel() else self.table.new_zeros(())
            self._ids = sent(self.table.where(self.table >= 0, live), self.device)
        return self._ids

    def kernel_fields(self, side: str) -> dict[str, Tensor]:
        """Fields of "k" or "v" by the quantizer's names: a pool ``[tiles, ...]`` if ``device_book`` has a table."""
        return {name[2:]: field for name, field in self.pool.fields.items() if name[0] == side}

    def device_book(self) -> DeviceBook:
        """Tables for kernels, made once a change of the book."""
        if self._device_book is None:
            live = self.table >= 0
            full = bool(((self.counts == self.tile) | ~live).all())

            def there(book: Tensor) -> Tensor:
                return sent(book, self.device, torch.int32).contiguous()

            self._device_book = DeviceBook(there(self.table), there(live.sum(-1)), None if full else there(self.counts))
        return self._device_book

    def decoded(self) -> tuple[Tensor, Tensor]:
        """All tokens in full precision: keys and values ``[B, H_kv, tiles * tile, D]``."""
        keys, values = self.packed()
        return self.codec.decode(self.tier.keys, keys), self.codec.decode(self.tier.values, values)

    def decode_into(self, keys: Tensor, values: Tensor) -> None:
        """Write ``decoded()`` into buffers ``[B, H_kv, tiles * tile, D]``, in pieces."""
        ids, block = self.ids(), max(4, -(-self.tiles // 8))
        for first in range(0, self.tiles, block):
            part = slice(first * self.tile, (first + block) * self.tile)
            for side, quantizer, out in (("k", self.tier.keys, keys), ("v", self.tier.values, values)):
                out[:, :, part] = self.codec.decode(quantizer, self._side(side, ids[..., first : first + block]))

    @property
    def alike(self) -> bool:
        """Whether all heads of a row hold tokens of the same positions."""
        if self._alike is None:
            one = self.starts[:, :1].expand_as(self.starts), self.counts[:, :1].expand_as(self.counts)
            self._alike = not self.explicit and torch.equal(self.starts, one[0]) and torch.equal(self.counts, one[1])
        return self._alike

    def present(self, wanted: Tensor) -> Tensor:
        """Tiles that are there if those of bool ``[B, H_kv, n]`` are wanted: some belong to all heads together."""
        return wanted.any(1, keepdim=True).expand_as(wanted) if self.together else wanted

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        held = self.pool.tensors()
        held["table"], held["counts"], held["starts"] = self.table, self.counts, self.starts
        if self.explicit:
            held["positions"] = self.offsets
        if self._ids is not None:
            held["ids"] = self._ids
        if self._valid is not None:
            held["valid"] = self._valid
        if self._device_book is not None:
            held["device.used"] = self._device_book.used
            if self._device_book.table is not None:
                held["device.table"] = self._device_book.table
            if self._device_book.counts is not None:
                held["device.counts"] = self._device_book.counts
        held.update({f"statistic.{name}": t for name, t in self.statistics.items()})
        return held

    # --- moving tokens ---
    def append(self, tokens: Tokens, index: Tensor | None = None) -> None:
        """Encode ``tokens`` behind what is here, in pieces, so that the encoders' temporaries stay small.

        Args:
            tokens: the first ``counts[b, h]`` of each row and head are meant; ``first`` is that of those.
            index: int64 ``[B, H_kv, K]``: where those are instead, in order of position.
        """
        if not bool(tokens.counts.any()):
            return
        if bool((tokens.counts % self.tile).any()):
            index = _without_slack(tokens, index)
        rows = tokens.counts.amax(1).nonzero().flatten()
        counts = tokens.counts[rows]
        width = int(counts.max())
        new = -(-width // self.tile)
        filled = (counts[..., None] - torch.arange(new) * self.tile).clamp(0, self.tile)  # [b, H, new]
        self.pool.reserve(int(self.present(filled > 0).sum()), self._alive())
        block = max(4, -(-new // 8))
        for first in range(0, new, block):
            part = slice(first * self.tile, min((first + block) * self.tile, width))
            piece = _piece(tokens, index, part, rows)
            packed_k = self.codec.encode(self.tier.keys, piece.keys)
            packed_v = self.codec.encode(self.tier.values, piece.values)
            fields = {f"k.{n}": f for n, f in packed_k.fields.items()}
            fields |= {f"v.{n}": f for n, f in packed_v.fields.items()}
            self._enter(
                rows, filled[..., first : first + block], fields, piece.positions, piece.statistics, piece.first
            )

    def split(self, moving: Tensor, decode: bool = True) -> Tokens | None:
        """Take the tokens ``moving`` (bool ``[B, H_kv, tiles * tile]``) out and close the gaps.

        Codes of the tokens that stay are not touched. A format that shares metadata between tokens can only give up
        whole tiles; pass masks that are constant over each tile then.

        Returns:
            the tokens taken, in order of position, or ``None`` if ``decode`` is false (they are evicted).
        """
        live = self.valid()
        moving = moving if live is None else moving & live
        staying = ~moving if live is None else live & ~moving
        gone = moving.sum(-1).cpu()
        if not bool(gone.any()):
            return self._no_tokens() if decode else None
        touched, kept = (mask.unflatten(-1, (-1, self.tile)).any(-1) for mask in (moving, staying))
        taken = self._take(moving, gone) if decode else None
        if not bool((touched & kept).any()):
            self._keep_tiles(kept.cpu())
        else:
            self._keep_tokens(staying)
        self._release()
        return taken

    def crop(self, end: int) -> None:
        """Forget every token at position ``end`` or later (``end`` int, logical)."""
        if not self.tiles:
            return
        positions = self.positions().cpu().unflatten(-1, (-1, self.tile))
        counts = ((positions >= 0) & (positions < end)).sum(-1)
        if torch.equal(counts, self.counts):
            return
        self.counts = counts
        self._keep_tiles(counts > 0)
        self._release()

    def select_rows(self, index: Tensor) -> None:
        """Keep, repeat or reorder rows: row ``i`` becomes what row ``index[i]`` was. Tiles are shared, not copied."""
        device_index, index = sent(index, self.device), index.cpu()
        self.table, self.counts = self.table[index], self.counts[index]
        self.starts, self.offsets = self.starts[index], self.offsets[device_index]
        self.statistics = {name: t[device_index] for name, t in self.statistics.items()}
        self._trim()
        self._book_changed()
        self._release()

    def shift(self, by: int) -> None:
        """Every token is ``by`` (either sign) logical positions further on; positions must stay at least 0."""
        self.starts = self.starts + by
        if self.explicit:
            self.offsets = torch.where(self.offsets >= 0, self.offsets + by, self.offsets)
        self._book_changed()

    def join(self, other: TierStore) -> None:
        """Put copies of ``other``'s rows behind one's own; tiles that its rows share stay shared.

        Args:
            other: a store of an equal tier on the same device, left as it is but for how it notes positions.
        """
        if self.explicit or other.explicit:
            self._spell_positions()
            other._spell_positions()
        live = other.table >= 0
        used, place = torch.unique(other.table[live], return_inverse=True)
        ids = self.pool.write(other.pool.read(used.to(other.device)), self._alive())
        table = torch.full_like(other.table, -1).masked_scatter(live, ids[place])
        wide = max(self.tiles, other.tiles)
        self._widen(wide)

        def both(own: Tensor, theirs: Tensor, fill: int = 0) -> Tensor:
            missing = wide - theirs.shape[2]
            if missing:
                theirs = torch.nn.functional.pad(theirs, (0, 0) * (theirs.dim() - 3) + (0, missing), value=fill)
            return torch.cat([own, theirs])

        self.table, self.counts = both(self.table, table, -1), both(self.counts, other.counts)
        self.starts = both(self.starts, other.starts)
        self.offsets = (
            both(self.offsets, other.offsets, -1) if self.explicit else torch.cat([self.offsets, other.offsets])
        )
        self.statistics = {name: both(t, other.statistics[name]) for name, t in self.statistics.items()}
        self._book_changed()

    # --- undoing a forward pass ---
    def hold(self) -> None:
        """Remember what is here until ``let_go``, so that ``go_back`` can return to it. Tiles that are dropped stay."""
        statistics = {name: t.clone() for name, t in self.statistics.items()}
        self._held = _Book(self.table, self.counts, self.starts, self.offsets, self.explicit, statistics)

    def let_go(self) -> None:
        """Forget what ``hold`` remembered and free its tiles."""
        if self._held is not None:
            changed = self._held.table is not self.table
            self._held = None
            if changed:
                self._release()

    def go_back(self) -> None:
        """Be again as ``hold`` found it."""
        if self._held is None:
            return
        book, self._held = self._held, None
        self.table, self.counts, self.starts = book.table, book.counts, book.starts
        self.offsets, self.explicit, self.statistics = book.offsets, book.explicit, book.statistics
        self._book_changed()
        self._release()

    # --- state for checkpoints ---
    def state(self) -> dict[str, Tensor]:
        """Tensors from which ``load`` rebuilds the store: its live tiles, renumbered, and the book."""
        live = self.table >= 0
        used, place = torch.unique(self.table[live], return_inverse=True)
        table = torch.full_like(self.table, -1).masked_scatter(live, place)
        tiles = sent(used, self.device)
        state = {f"pool.{n}": t.index_select(0, tiles) for n, t in self.pool.fields.items()}
        state |= {"table": table, "counts": self.counts, "starts": self.starts, "offsets": self.offsets}
        return state | {f"statistic.{n}": t for n, t in self.statistics.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave."""
        self.pool.fields = {n: state[f"pool.{n}"].to(self.device).clone() for n in self.pool.fields}
        self.pool.capacity = next(iter(self.pool.fields.values())).shape[0]
        self.table, self.counts = state["table"].cpu().clone(), state["counts"].cpu().clone()
        self.starts, self.offsets = state["starts"].cpu().clone(), state["offsets"].to(self.device).clone()
        self.statistics = {n: state[f"statistic.{n}"].to(self.device).clone() for n in self.names}
        self._book_changed()

    # --- inside ---
    def _read(self, ids: Tensor) -> tuple[Packed, Packed]:
        return self._side("k", ids), self._side("v", ids)

    def _side(self, side: str, ids: Tensor) -> Packed:
        fields = self.pool.read(ids, f"{side}.")
        return Packed({name[2:]: field for name, field in fields.items()}, ids.shape[2] * self.tile, self.dtype)

    def _enter(
        self,
        rows: Tensor,
        filled: Tensor,
        fields: Mapping[str, Tensor],
        positions: Tensor,
        statistics: Mapping[str, Tensor],
        first: Tensor | None = None,
    ) -> None:
        """Write the tiles of ``rows`` whose ``filled[b, H, new]`` is positive and enter them in the book.

        Where the first position of consecutive ones is known, ``first[b, H or 1]`` (CPU), the device is not asked.
        """
        short = -positions.shape[-1] % self.tile
        tiled = torch.nn.functional.pad(positions, (0, short), value=-1).unflatten(-1, (-1, self.tile))
        tiled = tiled.expand(-1, self.heads, -1, -1)[:, :, : filled.shape[2]]
        starts = None if first is None else first[..., None] + torch.arange(filled.shape[2]) * self.tile
        if starts is None and not self.explicit:
            known, slots = tiled.cpu(), torch.arange(self.tile)
            starts = known[..., 0]
            if bool(((known - starts[..., None] - slots) * (slots < filled[..., None])).any()):
                self._spell_positions()
        b, h, t = self.present(filled > 0).nonzero(as_tuple=True)
        db, dh, dt = (sent(index, self.device) for index in (b, h, t))
        ids = self.pool.write({name: field[db, dh, dt] for name, field in fields.items()}, self._alive())
        slots = (self.table >= 0).sum(-1)[rows][b, h] + t
        self._widen(int(slots.max()) + 1)
        row = rows[b]
        where = (row, h, slots)
        self.table = self.table.index_put(where, ids)
        self.counts = self.counts.index_put(where, filled[b, h, t])
        at = (sent(row, self.device), dh, sent(slots, self.device))
        if self.explicit:
            self.offsets = self.offsets.index_put(at, tiled[db, dh, dt].to(torch.int32))
        elif starts is not None:
            self.starts = self.starts.index_put(where, starts.expand_as(filled)[b, h, t])
        for name, held in self.statistics.items():
            values = torch.nn.functional.pad(statistics[name], (0, short)).unflatten(-1, (-1, self.tile))
            held[at] = values[db, dh, dt]
        self._book_changed()

    def _take(self, moving: Tensor, gone: Tensor) -> Tokens:
        width = -(-int(gone.max()) // self.tile) * self.tile
        tiled = moving.unflatten(-1, (-1, self.tile))
        if self.tier.keys.moves_tokens and self.tier.values.moves_tokens:
            index = by_position(moving, self.positions())[..., :width]
            keys, values = self.packed()
            keys, values = self.tier.keys.select(keys, index), self.tier.values.select(values, index)
        else:
            touched = self.present(tiled.any(-1))
            order = left_pack(touched)[..., : max(1, int(touched.sum(-1).max()))]
            keys, values = self._read(self.ids().gather(2, order))
            index = (order[..., None] * self.tile + torch.arange(self.tile, device=self.device)).flatten(2)
            inner = by_position(moving.gather(2, index), self.positions().gather(2, index))[..., : int(gone.max())]
            index = index.gather(2, inner)
        taken_k, taken_v = self.codec.decode(self.tier.keys, keys), self.codec.decode(self.tier.values, values)
        if not (self.tier.keys.moves_tokens and self.tier.values.moves_tokens):
            spread = inner[..., None].expand(-1, -1, -1, taken_k.shape[-1])
            taken_k = taken_k.gather(2, spread)
            taken_v = taken_v.gather(2, inner[..., None].expand(-1, -1, -1, taken_v.shape[-1]))
        positions = self.positions().gather(2, index)
        statistics = {n: t.flatten(2).gather(2, index) for n, t in self.statistics.items()}
        return Tokens(taken_k, taken_v, positions, gone, statistics)

    def _keep_tiles(self, keep: Tensor) -> None:
        self.counts = self.counts * keep
        keep = self.present(keep)
        order = left_pack(keep)
        slots = sent(order, self.device)
        dropped = ~keep.gather(2, order)
        self.table = self.table.gather(2, order).masked_fill(dropped, -1)
        self.counts = self.counts.gather(2, order).masked_fill(dropped, 0)
        self.starts = self.starts.gather(2, order)
        self.offsets = (
            self.offsets.gather(2, slots[..., None].expand_as(self.offsets)) if self.explicit else self.offsets
        )
        self.statistics = {n: t.gather(2, slots[..., None].expand_as(t)) for n, t in self.statistics.items()}
        self._trim()
        self._book_changed()

    def _keep_tokens(self, staying: Tensor) -> None:
        """Regroup the tokens that stay into fresh tiles; rows that lose nothing keep theirs."""
        self._spell_positions()
        live = self.valid()
        lost = ~staying if live is None else live & ~staying
        rows = lost.any(-1).any(-1).cpu().nonzero().flatten()
        at = sent(rows, self.device)
        counts = staying[at].sum(-1).cpu()
        width = max(-(-int(counts.max()) // self.tile), 1) * self.tile
        index = by_position(staying[at], self.positions()[at])
        if index.shape[-1] < width:
            index = torch.nn.functional.pad(index, (0, width - index.shape[-1]))
        index = index[..., :width]
        keys, values = self._read(self.ids()[at])
        keys, values = self.tier.keys.select(keys, index), self.tier.values.select(values, index)
        positions = self.positions()[at].gather(2, index)
        statistics = {n: t[at].flatten(2).gather(2, index) for n, t in self.statistics.items()}
        self.table, self.counts = self.table.index_fill(0, rows, -1), self.counts.index_fill(0, rows, 0)
        fields = {f"k.{n}": f for n, f in keys.fields.items()} | {f"v.{n}": f for n, f in values.fields.items()}
        filled = (counts[..., None] - torch.arange(width // self.tile) * self.tile).clamp(0, self.tile)
        if bool((filled > 0).any()):
            self._enter(rows, filled, fields, positions, statistics)
        self._trim()
        self._book_changed()

    def _spell_positions(self) -> None:
        """Keep a position for every token from here on: a tile no longer holds consecutive ones."""
        if not self.explicit:
            self.offsets = self.positions().to(torch.int32).unflatten(-1, (-1, self.tile))
            self.explicit = True

    def _no_tokens(self) -> Tokens:
        batch = self.table.shape[0]
        empty = torch.empty((batch, self.heads, 0, self.tier.keys.head_dim), dtype=self.dtype, device=self.device)
        values = torch.empty((batch, self.heads, 0, self.tier.values.head_dim), dtype=self.dtype, device=self.device)
        none = torch.empty((batch, self.heads, 0), dtype=torch.long, device=self.device)
        statistics = {n: none.float() for n in self.names}
        return Tokens(empty, values, none, torch.zeros((batch, self.heads), dtype=torch.long), statistics)

    def _widen(self, tiles: int) -> None:
        extra = tiles - self.tiles
        if extra <= 0:
            return
        pad = torch.nn.functional.pad
        self.table = pad(self.table, (0, extra), value=-1)
        self.counts = pad(self.counts, (0, extra))
        self.starts = pad(self.starts, (0, extra))
        if self.explicit:
            self.offsets = pad(self.offsets, (0, 0, 0, extra), value=-1)
        self.statistics = {n: pad(t, (0, 0, 0, extra)) for n, t in self.statistics.items()}

    def _trim(self) -> None:
        used = int((self.table >= 0).sum(-1).max()) if self.table.numel() else 0
        if used < self.tiles:
            self.table, self.counts = self.table[..., :used].clone(), self.counts[..., :used].clone()
            self.starts = self.starts[..., :used].clone()
            if self.explicit:
                self.offsets = self.offsets[:, :, :used].clone()
            self.statistics = {n: t[:, :, :used].clone() for n, t in self.statistics.items()}

    def _alive(self) -> Tensor:
        """Ids of the tiles that must not be overwritten."""
        return self.table if self._held is None else torch.cat([self.table.flatten(), self._held.table.flatten()])

    def _release(self) -> None:
        if self._held is not None:
            return  # dropped tiles may be wanted back
        mapping = self.pool.compact(self.table)
        if mapping is not None:
            self.table = torch.where(self.table >= 0, mapping[self.table.clamp_min(0)] if len(mapping) else -1, -1)
            self._book_changed()

    def _book_changed(self) -> None:
        self._ids = None
        self._valid = None
        self._alike = None
        self._device_book = None


def _without_slack(tokens: Tokens, index: Tensor | None) -> Tensor:
    """``index`` with each row's last token repeated past its count, so that nothing else has a say in a shared scale."""
    width = int(tokens.counts.max())
    at = torch.minimum(torch.arange(width), (tokens.counts[..., None] - 1).clamp_min(0)).to(tokens.keys.device)
    return at if index is None else index.gather(2, at)


def _piece(tokens: Tokens, index: Tensor | None, part: slice, rows: Tensor) -> Tokens:
    """Slots ``part`` of ``rows``: of ``tokens`` as they are, or of what ``index`` picks from them."""
    device = tokens.keys.device
    at = None if len(rows) == tokens.counts.shape[0] else sent(rows, device)

    def of(held: Tensor) -> Tensor:
        if index is None:
            found = held[:, :, part]
        else:
            chosen = index[:, :, part]
            wide = chosen[..., None].expand(-1, -1, -1, held.shape[3]) if held.dim() == 4 else chosen
            found = held.expand(-1, index.shape[1], *held.shape[2:]).gather(2, wide)
        return found if at is None else found[at]

    statistics = {name: of(t) for name, t in tokens.statistics.items()}
    first = None if tokens.first is None else tokens.first[rows] + part.start
    return Tokens(of(tokens.keys), of(tokens.values), of(tokens.positions), tokens.counts[rows], statistics, first)
