"""The tokens of one tier of one layer: a pool of packed tiles and the table that says whose they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fade_core.interfaces import Tier
from fade_core.packed import Packed, Tiles
from fade_core.storage.codec import Codec, put
from fade_core.storage.pool import TilePool, numbered
from fade_core.storage.slots import TokenLayout, by_position, left_pack, picked, under
from fade_core.storage.tile_table import TileTable
from fade_core.storage.tile_view import TileView
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

    def part(self, slots: slice, rows: Tensor, index: Tensor | None) -> Tokens:
        """The tokens ``slots`` of ``rows`` (int64 ``[b]``, CPU), counted in ``index`` ``[B, H_kv, K]`` if there is one."""
        at = None if len(rows) == len(self.counts) else sent(rows, self.keys.device)

        def of(held: Tensor) -> Tensor:
            found = held[:, :, slots] if index is None else picked(held, index[:, :, slots])
            return found if at is None else found[at]

        statistics = {name: of(held) for name, held in self.statistics.items()}
        first = None if self.first is None else self.first[rows] + slots.start
        return Tokens(of(self.keys), of(self.values), of(self.positions), self.counts[rows], statistics, first)


SPARSE = 0.75
"""A pool of which less than this share is in use gives the rest back."""


class TierStore:
    """Packed tokens of one tier: ragged over rows and heads, in whole tiles except where a crop cut one short.

    Where a quantizer codes ``heads_together``, all heads of a row have tile ``n`` as long as one of them has tokens in it.

    Args:
        tier: name, capacity and quantizers.
        batch: rows ``B``.
        layout: heads, dtype, device, and what is kept of a token beside it.
        stores_positions: keep a position for every token. Where tokens only ever move by age a tile holds consecutive
            positions, and only its first one is kept.
        codec: how tokens are packed and unpacked.
        fixed: tiles a row and head that are reserved for good, so that nothing moves; 0 to grow.
        width: tiles that a row and head may have at most, where heads share what is ``fixed`` unevenly.

    Attributes:
        moves_tokens: whether single tokens can be regrouped without touching their codes.
        runs: whether the pool can be read without the table.
        heads_aligned: whether all heads of a row are known to hold tokens of the same positions.
    """

    def __init__(
        self,
        tier: Tier,
        batch: int,
        layout: TokenLayout,
        stores_positions: bool,
        codec: Codec | None = None,
        fixed: int = 0,
        width: int = 0,
    ) -> None:
        self.codec = codec if codec is not None else Codec()
        self.tier, self.layout, self.device, self.fixed = tier, layout, layout.device, fixed
        self.tile, self.heads = tier.keys.tile, layout.heads
        self._sides = {"k.": tier.keys, "v.": tier.values}
        self.moves_tokens = all(quantizer.moves_tokens for quantizer in self._sides.values())
        shapes = {
            side + name: (shape, layout.dtype if name == "raw" else dtype)
            for side, quantizer in self._sides.items()
            for name, (shape, dtype) in quantizer.field_shapes().items()
        }
        self.pool = TilePool(shapes, self.device)
        shared = any(quantizer.heads_together for quantizer in self._sides.values())
        self.table = TileTable(batch, max(fixed, width), self.tile, layout, stores_positions, shared)
        self.pool.grow(batch * self.heads * fixed)
        self.clear()

    def clear(self) -> None:
        """Hold no token; a store of fixed size stays where it is, with all of its tiles reserved."""
        self.table.use(torch.zeros_like(self.table.used.host))
        self.table.shared = False
        self.heads_aligned = not self.table.stores_positions
        self._changed()
        self.reserve(0, self.fixed)

    # --- what is here ---
    @property
    def tiles(self) -> int:
        """Tiles of the longest row and head."""
        return self.table.tiles

    @property
    def lengths(self) -> Tensor:
        """Live tokens, int64 ``[B, H_kv]`` on the CPU."""
        return self.table.live_counts().sum(-1)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Tracked statistics, float32 ``[B, H_kv, longest]`` a name; views."""
        return self.table.slots.statistics(self.tiles)

    def live_positions(self) -> Tensor:
        """int64 ``[B, H_kv, tiles * tile]``, -1 where there is no token."""
        view = self.view()
        positions, valid = view.positions(), view.valid()
        return positions if valid is None else positions.masked_fill(~valid, -1)

    def view(self) -> TileView:
        """The tiles in use, as attention reads them."""
        table = self.table
        counts = None if table.whole() else table.counts.device
        where = self.pool.fields, table.ids.device, table.used.device, counts, self.runs
        return TileView(self.tier, *where, self.layout.dtype, self.tiles, table.even(), table.slots.tensors)

    @property
    def longest(self) -> int:
        """Slots of the longest row and head, ``tiles * tile``."""
        return self.tiles * self.tile

    def note(self, name: str) -> Tensor:
        """A number that each token carries, ``[B, H_kv, longest]``; a view."""
        return self.table.slots[name][:, :, : self.tiles].flatten(2)

    def decode(self, side: int) -> Tensor:
        """Keys (0) or values (1) in full precision, ``[B, H_kv, longest, D]``."""
        return self._decoded(("k.", "v.")[side], self.view().pool_ids())

    def decode_into(self, keys: Tensor, values: Tensor) -> None:
        """Write all tokens in full precision into buffers ``[B, H_kv, tiles * tile, D]``, in pieces."""
        ids = self.view().pool_ids()
        for part in _pieces(self.tiles):
            for side, out in zip(self._sides, (keys, values), strict=True):
                out[:, :, part.start * self.tile : part.stop * self.tile] = self._decoded(side, ids[:, :, part])

    def _decoded(self, side: str, ids: Tensor) -> Tensor:
        """Keys ("k.") or values ("v.") ``[b, H_kv, n * tile, D]`` of the pool tiles ``ids`` ``[b, H_kv, n]``."""
        return self.codec.decode_from(self._sides[side], under(self.pool.fields, side), ids, self.layout.dtype)

    def _selected(self, index: Tensor, rows: Tensor | None = None) -> list[Packed]:
        """Codes of the keys and values of the slots ``index`` ``[b, H_kv, K]`` of ``rows`` (int64 ``[b]``; all by default)."""
        view = self.view()
        packed = view.packed(None if rows is None else view.pool_ids()[rows])
        return [quantizer.select(held, index) for quantizer, held in zip(self._sides.values(), packed, strict=True)]

    # --- room ---
    def ahead(self) -> int:
        """Tiles that every row and head has reserved."""
        spare = self.table.reserved.host - self.table.used.host
        return int(spare.min()) if spare.numel() else 0

    def reserve(self, need: int, want: int) -> None:
        """Reserve tiles for every row and head; steps have to be told.

        Args:
            need: tiles that each must have ahead.
            want: tiles that each gets, if ``need`` is not met; a store of fixed size gives what it has.
        """
        if self.ahead() >= max(need, 1 if self.fixed else need):
            return
        table, rows = self.table, self.table.used.host.numel()
        if self.fixed and rows:
            spare = len(self.pool.free(table.alive())) + int((table.reserved.host - table.used.host).sum())
            want = min(want, spare // rows, table.width - self.tiles)
        self.make_room(torch.full_like(table.used.host, max(need, want)))

    def make_room(self, wanted: Tensor) -> bool:
        """Reserve ``wanted`` ``[B, H_kv]`` tiles behind those in use; says whether they were not yet."""
        table, pool, after = self.table, self.pool, self.table.used.host + wanted
        if bool((after <= table.reserved.host).all()):
            return False
        in_runs = self.runs and pool.capacity == table.ids.device.numel()
        source = table.alive()
        if int(after.max()) > table.width:
            table.resize(int(after.max()))
            held, laid = table.held(), table.in_runs()
            if in_runs and table.even() and bool((after == after[0, 0]).all()):  # tiles move to lie in runs again
                pool.grow(laid.numel(), source, laid[held])
                table.ids.replace(laid.masked_fill(~held, -1))
        missing = ~table.held() & (torch.arange(table.width) < after[..., None])
        laid = table.in_runs()[missing]
        table.ids.host[missing] = pool.take(laid, table.alive()).int()
        table.reserved.replace(torch.maximum(table.reserved.host, after))
        self._changed()
        return True

    def give_back(self) -> None:
        """Free the tiles that are reserved; steps have to be told."""
        self.table.use(self.table.used.host)
        self.release(few=True)

    def release(self, resized: bool = False, few: bool = False) -> None:
        """Free tiles that nobody holds any more, if they are many; a store of fixed size keeps them for others.

        Args:
            resized: there are more or fewer rows now, and a store of fixed size has room for those.
            few: free them however few they are.
        """
        table = self.table
        used, place = numbered(table.alive())
        if resized if self.fixed else len(used) < self.pool.capacity * (1 if few else SPARSE):
            self.pool.keep(used)  # in the order of the table: they may be runs again
            table.ids.host.masked_scatter_(table.held(), place.int())
        needed = int(table.reserved.host.max()) if len(table.reserved.host) else 0
        if self.fixed and resized:
            self.pool.grow(max(len(used), table.used.host.numel() * self.fixed))
        elif not self.fixed and self._is_wide(needed):
            table.resize(needed)
        self._changed()

    def shed(self) -> bool:
        """Free tiles that are reserved, if they are so many that a store that grows gives them back; says whether it did."""
        table, used = self.table, self.table.used.host
        if self.fixed or not (int(used.sum()) < self.pool.capacity * SPARSE or self._is_wide(int(used.max()))):
            return False
        table.use(used.clone())
        self.release()
        return True

    def _is_wide(self, tiles: int) -> bool:
        """Whether the table has many more entries than ``tiles`` for a row and head."""
        return self.table.width > tiles + max(1, tiles // 16)

    def _changed(self) -> None:
        """The host has changed the table: steps find it so."""
        self.runs = self.pool.capacity >= self.table.ids.device.numel() and self.table.runs()
        self.table.publish()

    # --- moving tokens ---
    def append(self, tokens: Tokens, index: Tensor | None = None) -> None:
        """Encode ``tokens`` behind what is here, in pieces where encoders have temporaries, so that those stay small.

        Args:
            tokens: the first ``counts[b, h]`` of each row and head are meant; ``first`` is that of those.
            index: int64 ``[B, H_kv, K]``: where those are instead, in order of position.
        """
        if not bool(tokens.counts.any()):
            return
        width = int(tokens.counts.max())
        if bool((tokens.counts % self.tile).any()):
            # what fills the last tile is its last token: nothing else has a say in a shared scale
            last = (tokens.counts[..., None] - 1).clamp_min(0)
            at = torch.minimum(torch.arange(width), last).to(tokens.keys.device)
            index = at if index is None else index.gather(2, at)
        rows = tokens.counts.amax(1).nonzero().flatten()
        filled, ids = self._places(rows, tokens.counts[rows])
        whole = index is None and len(rows) == len(tokens.counts) and self._takes_whole(tokens, ids)
        for tiles in [slice(0, ids.shape[2])] if whole else _pieces(ids.shape[2]):
            slots = slice(tiles.start * self.tile, min(tiles.stop * self.tile, width))
            piece = tokens.part(slots, rows, index)
            for (side, quantizer), new in zip(self._sides.items(), (piece.keys, piece.values), strict=True):
                self.codec.encode_into(quantizer, new, under(self.pool.fields, side), ids[:, :, tiles])
            self._enter(rows, filled[:, :, tiles], piece.positions, piece.statistics, piece.first)
        self._changed()

    def _takes_whole(self, tokens: Tokens, ids: Tensor) -> bool:
        """Whether kernels write ``tokens`` to the tiles ``ids`` of the pool in one pass."""
        sides = zip(self._sides.items(), (tokens.keys, tokens.values), strict=True)
        slots = slice(ids.shape[2] * self.tile)
        return all(
            self.codec.in_one_pass(quantizer, new[:, :, slots], under(self.pool.fields, side), ids)
            for (side, quantizer), new in sides
        )

    def _places(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Room for ``counts`` ``[b, H_kv]`` more tokens of ``rows``: how many each new tile gets, and its pool id.

        Both are int64 ``[b, H_kv, n]`` on the CPU; the id is -1 for tiles that will not be there.
        """
        table, number = self.table, torch.arange(-(-int(counts.max()) // self.tile))
        filled = (counts[..., None] - number * self.tile).clamp(0, self.tile)
        present, wanted = table.present(filled > 0), torch.zeros_like(table.used.host)
        wanted[rows] = present.sum(-1).int()
        self.make_room(wanted)
        at = (table.used.host[rows].long()[..., None] + number).clamp_max(table.width - 1)
        return filled, table.ids.host[rows].long().gather(2, at).masked_fill(~present, -1)

    def _enter(
        self, rows: Tensor, filled: Tensor, positions: Tensor, statistics: Mapping[str, Tensor], first: Tensor | None
    ) -> None:
        """Enter tiles that are packed now, as the next of ``rows``: of ``filled[b, h, n]`` tokens, told as in ``Tokens``."""
        table, tiles, starts = self.table, filled.shape[2], torch.empty(0)

        def tiled(held: Tensor, fill: int = 0) -> Tensor:
            whole: Tensor = pad(held, (0, -held.shape[2] % self.tile), value=fill).unflatten(2, (-1, self.tile))
            return whole.expand(-1, self.heads, -1, -1)[:, :, :tiles]  # [b, H_kv, n, tile]

        new = {"positions": tiled(positions, -1)}
        new |= {f"statistic.{name}": tiled(held) for name, held in statistics.items()}
        if first is not None:
            starts = first[..., None] + torch.arange(tiles) * self.tile  # [b, H_kv or 1, n]
        elif table.starts is not None:
            known, slots = new["positions"].cpu(), torch.arange(self.tile)
            starts = known[..., 0]
            if bool(((known - starts[..., None] - slots) * (slots < filled[..., None])).any()):
                table.store_positions()
        self.heads_aligned = self.heads_aligned and table.starts is not None and _alike(filled) and _alike(starts)
        b, h, t = table.present(filled > 0).nonzero(as_tuple=True)
        row, slot = rows[b], table.used.host[rows[b], h].long() + t
        table.counts.host[row, h, slot] = filled[b, h, t].int()
        b_, row_, h_, t_, slot_ = (sent(index, self.device) for index in (b, row, h, t, slot))
        for name, held in table.slots.tensors.items():
            if name == "starts":
                held[row_, h_, slot_] = sent(starts.expand_as(filled)[b, h, t], self.device, torch.int32)
            else:  # a token that is new here is not moved yet
                held[row_, h_, slot_] = 0 if name == "shift" else new[name][b_, h_, t_].to(held.dtype)
        table.used.host.index_put_((row, h), torch.ones_like(row, dtype=torch.int32), accumulate=True)

    def split(self, moving: Tensor, decode: bool = True) -> Tokens | None:
        """Take the tokens ``moving`` (bool ``[B, H_kv, tiles * tile]``) out and close the gaps.

        Codes of the tokens that stay are not touched. A format that shares metadata between tokens can only give up
        whole tiles; pass masks that are constant over each tile then.

        Returns:
            the tokens taken, in order of position, or ``None`` if ``decode`` is false (they are evicted) or none is.
        """
        live = self.view().valid()
        moving = moving if live is None else moving & live
        staying = ~moving if live is None else live & ~moving
        gone = moving.sum(-1).cpu()
        if not bool(gone.any()):
            return None
        touched, kept = (mask.unflatten(-1, (-1, self.tile)).any(-1) for mask in (moving, staying))
        taken = self._take(moving, gone) if decode else None
        self.heads_aligned = self.heads_aligned and _alike(moving)
        if bool((touched & kept).any()):
            self._regroup(moving, staying)
        else:
            self.table.keep(kept.cpu())
        self.release()
        return taken

    def _take(self, moving: Tensor, gone: Tensor) -> Tokens:
        """The tokens ``moving``, decoded; ``gone`` ``[B, H_kv]`` of each row and head."""
        positions, most = self.live_positions(), int(gone.max())
        if self.moves_tokens:
            index = by_position(moving, positions)[..., : -(-most // self.tile) * self.tile]
            selected = zip(self._sides.values(), self._selected(index), strict=True)
            keys, values = (self.codec.decode(quantizer, packed) for quantizer, packed in selected)
        else:
            touched = self.table.present(moving.unflatten(-1, (-1, self.tile)).any(-1))
            tiles = left_pack(touched)[..., : max(1, int(touched.sum(-1).max()))]
            index = (tiles[..., None] * self.tile + torch.arange(self.tile, device=self.device)).flatten(2)
            inner = by_position(moving.gather(2, index), positions.gather(2, index))[..., :most]
            index, ids = index.gather(2, inner), self.view().pool_ids().gather(2, tiles)
            keys, values = (picked(self._decoded(side, ids), inner) for side in self._sides)
        statistics = {name: held.gather(2, index) for name, held in self.statistics.items()}
        return Tokens(keys, values, positions.gather(2, index), gone, statistics)

    def recode(self, ids: Tensor, order: Tensor, into: TierStore, places: Tensor) -> None:
        """Decode the pool tiles ``ids`` ``[B, H_kv, n]`` and encode their tokens for another tier.

        Args:
            ids: on the device.
            order: int64 ``[B, H_kv, n * tile]``: which token comes where.
            into: the other tier's store.
            places: pool tiles there, int64 ``[B, H_kv, n]`` on the device; -1 for what is not written.
        """
        for side, quantizer in into._sides.items():
            tokens, fields = self._decoded(side, ids), under(into.pool.fields, side)
            for part in _pieces(ids.shape[2]):
                slots = order[:, :, part.start * self.tile : part.stop * self.tile]
                into.codec.encode_into(quantizer, picked(tokens, slots), fields, places[:, :, part].contiguous())

    def warm_up(self) -> None:
        """Decode and encode a tile of an empty store, writing nothing: what kernels compile at first use is compiled now."""
        if not self.pool.capacity or any(quantizer.learns for quantizer in self._sides.values()):
            return
        ids = torch.zeros((*self.table.used.host.shape, 1), dtype=torch.long, device=self.device)
        for side, quantizer in self._sides.items():
            self.codec.encode_into(
                quantizer, self._decoded(side, ids), under(self.pool.fields, side), torch.full_like(ids, -1)
            )

    def _regroup(self, moving: Tensor, staying: Tensor) -> None:
        """Regroup the tokens that stay into whole tiles; rows that lose nothing keep theirs."""
        table = self.table
        table.store_positions()
        rows = moving.any(-1).any(-1).cpu().nonzero().flatten()
        at = sent(rows, self.device)
        counts, positions = staying[at].sum(-1).cpu(), self.live_positions()[at]
        index = by_position(staying[at], positions)[..., : -(-int(counts.max()) // self.tile) * self.tile]
        selected = self._selected(index, at)
        statistics = {name: held[at].gather(2, index) for name, held in self.statistics.items()}
        # the codes are copied: the rows' own tiles are free now, and the first to be taken again
        used = table.used.host.clone()
        used[rows] = 0
        table.use(used)
        filled, places = self._places(rows, counts)
        for side, tokens in zip(self._sides, selected, strict=True):
            put(tokens, Tiles(under(self.pool.fields, side), places))
        self._enter(rows, filled, positions.gather(2, index), statistics, None)

    def crop(self, end: int) -> None:
        """Forget every token at position ``end`` or later (``end`` int, logical)."""
        if not self.tiles:
            return
        positions = self.live_positions().cpu().unflatten(-1, (-1, self.tile))
        counts = ((positions >= 0) & (positions < end)).sum(-1)
        if torch.equal(counts, self.table.live_counts()):
            return
        self.table.counts.host[:, :, : counts.shape[2]] = counts.int()
        self.table.keep(counts > 0)
        self.release()

    def select_rows(self, index: Tensor) -> None:
        """Keep, repeat or reorder rows: row ``i`` becomes what row ``index[i]`` was. Tiles are shared, not copied."""
        rows = len(self.table.used.host)
        self.table.select_rows(index.cpu())
        self.release(resized=rows != len(index))

    def join(self, other: TierStore) -> None:
        """Put copies of ``other``'s rows behind one's own; tiles that its rows share stay shared.

        Args:
            other: a store of an equal tier on the same device, left as it is but for how it notes positions.
        """
        if self.table.stores_positions or other.table.stores_positions:
            self.table.store_positions()
            other.table.store_positions()
        theirs = other.table.live_ids()
        used, place = numbered(theirs[theirs >= 0])
        ids = self.pool.write(other.pool.read(used), self.table.alive())
        self.table.join(other.table, torch.full_like(theirs, -1).masked_scatter(theirs >= 0, ids[place]))
        self.heads_aligned = self.heads_aligned and other.heads_aligned
        self.release(resized=True)

    def shift(self, by: int) -> None:
        """Every token is ``by`` (either sign) logical positions further on; positions must stay at least 0."""
        self.table.slots["positions" if self.table.stores_positions else "starts"].add_(by)

    # --- a pass ---
    def snapshot(self) -> Callable[[], None]:
        """What takes a pass back: tiles that came since are free then, or reserved, and statistics as they were."""
        used, before = self.table.used.host.clone(), {name: held.clone() for name, held in self.statistics.items()}

        def restore() -> None:
            self.table.use(used)
            for name, held in self.statistics.items():
                held.copy_(before[name])
            self.release()
            self.reserve(0, self.fixed)

        return restore


def _pieces(tiles: int) -> list[slice]:
    """At most eight slices of ``tiles`` tiles, or of four tiles each."""
    block = max(4, -(-tiles // 8))
    return [slice(first, min(first + block, tiles)) for first in range(0, tiles, block)]


def _alike(heads: Tensor) -> bool:
    """Whether ``[B, H, ...]`` says the same of all heads of a row."""
    return bool((heads == heads[:, :1]).all())
