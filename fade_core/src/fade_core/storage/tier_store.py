"""The tokens of one tier of one layer: a pool of packed tiles and the table that says whose they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.interfaces import Tier
from fade_core.packed import Packed
from fade_core.storage.codec import Codec
from fade_core.storage.pool import TilePool
from fade_core.storage.tile_table import TileTable
from fade_core.storage.tile_view import DeviceTable, TileView
from fade_core.support.transfer import sent

_GROWTH = 32
"""Tables that grow take at least 1/32 more than they have."""


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
class _Before:
    """What of a store a pass may change: tiles in use, and statistics."""

    used: Tensor
    statistics: dict[str, Tensor]


def left_pack(chosen: Tensor) -> Tensor:
    """Indices that bring the true entries of bool ``[..., N]`` to the front, their order kept."""
    return torch.argsort(~chosen, dim=-1, stable=True)


def by_position(chosen: Tensor, positions: Tensor) -> Tensor:
    """Indices that bring the true entries of bool ``[..., N]`` to the front, in order of ``positions``."""
    return torch.argsort(positions.masked_fill(~chosen, torch.iinfo(positions.dtype).max), dim=-1, stable=True)


class TierStore:
    """Packed tokens of one tier: ragged over rows and heads, in whole tiles except where a crop cut one short.

    Where a quantizer codes ``heads_together``, all heads of a row have tile ``n`` as long as one of them has tokens in it.
    Where tokens only ever move by age (``explicit=False``) a tile holds consecutive positions and only its first one is
    kept.

    Args:
        tier: name, capacity and quantizers.
        batch: rows ``B``.
        heads: KV heads ``H_kv``.
        device: where tokens live.
        dtype: dtype that decoding gives back.
        explicit: keep a position for every token.
        statistics: tracked statistics to keep a token.
        codec: how tokens are packed and unpacked.
        shifted: whether each token carries how far it is moved when it is read (contiguous re-positioning).
        fixed: tiles a row and head that are reserved for good, so that nothing moves; 0 to grow.
        width: tiles that a row and head may have at most, where heads share what is ``fixed`` unevenly.
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
        shifted: bool = False,
        fixed: int = 0,
        width: int = 0,
    ) -> None:
        self.codec = codec if codec is not None else Codec()
        self.tier, self.device, self.dtype, self.fixed = tier, device, dtype, fixed
        self.tile, self.heads, self.names = tier.keys.tile, heads, statistics
        self.together = tier.keys.heads_together or tier.values.heads_together
        self.pool = TilePool(self._shapes(), device)
        kinds = {"positions": torch.int32} if explicit else {}
        kinds |= {f"statistic.{name}": torch.float32 for name in statistics}
        kinds |= {"shift": torch.int32} if shifted else {}
        self.book = TileTable(batch, heads, max(fixed, width), self.tile, device, kinds)
        self.runs, self.aligned = True, not explicit
        if fixed:
            self.pool.grow(batch * heads * fixed)
            self.clear()

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        shapes = {}
        for side, quantizer in (("k", self.tier.keys), ("v", self.tier.values)):
            for name, (shape, dtype) in quantizer.field_shapes().items():
                shapes[f"{side}.{name}"] = (shape, self.dtype if name == "raw" else dtype)
        return shapes

    def clear(self) -> None:
        """Hold no token; a store of fixed size stays where it is, with all of its tiles reserved."""
        book = self.book
        for mirror, empty in ((book.ids, -1), (book.used, 0), (book.reserved, 0), (book.counts, self.tile)):
            mirror.host.fill_(empty)
        self.aligned = not self.explicit
        self.reserve(0, self.fixed)
        self._changed()

    # --- what is here ---
    @property
    def explicit(self) -> bool:
        """Whether a position is kept for every token."""
        return "positions" in self.book.notes

    @property
    def tiles(self) -> int:
        """Tiles of the longest row and head."""
        return self.book.tiles

    @property
    def table(self) -> Tensor:
        """Pool ids of the tiles in use, int64 ``[B, H_kv, tiles]`` on the CPU, -1 for none."""
        live = self.book.live()
        return self.book.ids.host[:, :, : live.shape[2]].long().masked_fill(~live, -1)

    @property
    def counts(self) -> Tensor:
        """Live tokens of each tile, int64 ``[B, H_kv, tiles]`` on the CPU."""
        live = self.book.live()
        return self.book.counts.host[:, :, : live.shape[2]].long() * live

    @property
    def lengths(self) -> Tensor:
        """Live tokens, int64 ``[B, H_kv]`` on the CPU."""
        return self.counts.sum(-1)

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Tracked statistics, float32 ``[B, H_kv, tiles, tile]`` a name; views."""
        tiles = self.tiles
        return {name: self.book.notes[f"statistic.{name}"][:, :, :tiles] for name in self.names}

    @property
    def size(self) -> int:
        """Slots of the longest row and head, ``tiles * tile``."""
        return self.tiles * self.tile

    def note(self, name: str) -> Tensor:
        """A number kept of each token, ``[B, H_kv, tiles * tile]``, a view."""
        return self.book.notes[name][:, :, : self.tiles].flatten(2)

    def valid(self) -> Tensor | None:
        """bool ``[B, H_kv, tiles * tile]`` of live tokens, or ``None`` if every slot is live."""
        if self.book.even() and self.book.whole():
            return None
        return sent(self.book.valid().flatten(2), self.device)

    def positions(self) -> Tensor:
        """int64 ``[B, H_kv, tiles * tile]``, -1 where there is no token."""
        tiles = self.tiles
        if self.book.starts is None:
            found = self.book.notes["positions"][:, :, :tiles].flatten(2).long()
        else:
            slots = torch.arange(self.tile, device=self.device)
            found = (self.book.starts[:, :, :tiles, None].long() + slots).flatten(2)
        valid = self.valid()
        return found if valid is None else found.masked_fill(~valid, -1)

    @property
    def alike(self) -> bool:
        """Whether all heads of a row are known to hold tokens of the same positions."""
        return self.aligned

    def view(self) -> TileView:
        """The tiles in use, as attention reads them."""
        book = self.book
        valid = None if book.whole() else book.counts.device
        fields = self.pool.fields
        return TileView(
            self.tier, fields, book.ids.device, book.used.device, valid, self.runs, self.dtype, self.tiles, book.even()
        )

    def packed(self) -> tuple[Packed, Packed]:
        """All tokens as ``Packed`` keys and values, fields ``[B, H_kv, tiles, ...]``."""
        view = self.view()
        return view.packed_keys(), view.packed_values()

    def packed_keys(self) -> Packed:
        """All keys, fields ``[B, H_kv, tiles, ...]``."""
        return self.view().packed_keys()

    def packed_values(self) -> Packed:
        """All values, fields ``[B, H_kv, tiles, ...]``."""
        return self.view().packed_values()

    def kernel_fields(self, side: str) -> dict[str, Tensor]:
        """As ``TileView.kernel_fields``."""
        return self.view().kernel_fields(side)

    def device_book(self) -> DeviceTable:
        """As ``TileView.device_book``."""
        return self.view().device_book()

    def decoded(self) -> tuple[Tensor, Tensor]:
        """All tokens in full precision: keys and values ``[B, H_kv, tiles * tile, D]``."""
        keys, values = self.packed()
        return self.codec.decode(self.tier.keys, keys), self.codec.decode(self.tier.values, values)

    def decode(self, side: int) -> Tensor:
        """All keys (0) or values (1) in full precision, ``[B, H_kv, size, D]``."""
        view = self.view()
        if side:
            return self.codec.decode(self.tier.values, view.packed_values())
        return self.codec.decode(self.tier.keys, view.packed_keys())

    def decode_into(self, keys: Tensor, values: Tensor) -> None:
        """Write ``decoded()`` into buffers ``[B, H_kv, tiles * tile, D]``, in pieces."""
        view = self.view()
        block = max(4, -(-view.tiles // 8))
        for first in range(0, view.tiles, block):
            part = slice(first * self.tile, (first + block) * self.tile)
            piece = view.part(slice(first, min(first + block, view.tiles)))
            keys[:, :, part] = self.codec.decode(self.tier.keys, piece.packed_keys())
            values[:, :, part] = self.codec.decode(self.tier.values, piece.packed_values())

    def present(self, wanted: Tensor) -> Tensor:
        """Tiles that are there if those of bool ``[B, H_kv, n]`` are wanted: some belong to all heads together."""
        return wanted.any(1, keepdim=True).expand_as(wanted) if self.together else wanted

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        return self.pool.tensors() | self.book.tensors()

    # --- room ---
    def ahead(self) -> int:
        """Tiles that every row and head has reserved."""
        spare = self.book.reserved.host - self.book.used.host
        return int(spare.min()) if spare.numel() else 0

    def reserve(self, need: int, want: int) -> bool:
        """Reserve tiles for every row and head; says whether steps have to be told.

        Args:
            need: tiles that each must have ahead.
            want: tiles that each gets, if ``need`` is not met; a store of fixed size gives what it has.
        """
        if self.ahead() >= max(need, 1 if self.fixed else need):
            return False
        rows = self.book.used.host.numel()
        if self.fixed and rows:
            spare = len(self.pool.free(self.book.alive())) + int((self.book.reserved.host - self.book.used.host).sum())
            want = max(need, min(want, spare // rows, self.book.width - self.tiles))
        return self._make_room(torch.full_like(self.book.used.host, max(need, want)), spare=True)

    def _make_room(self, wanted: Tensor, spare: bool = False) -> bool:
        """Reserve ``wanted`` tiles ``[B, H_kv]`` behind those in use; says whether buffers or ``runs`` are others now.

        Args:
            wanted: tiles a row and head, on the CPU.
            spare: whether a table that has to grow takes some more.
        """
        book, before = self.book, (self.book.width, self.pool.capacity, self.runs)
        after = book.used.host + wanted
        if bool((after <= book.reserved.host).all()):
            return False
        width = int(after.max())
        if spare and width > book.width:
            width = max(width, book.width + book.width // _GROWTH)
        even = bool((after == after[0, 0]).all()) and book.even()
        if even and self.runs and self.pool.capacity == book.ids.host.numel() and width > book.width:
            self._lay_out(width)
        else:
            book.widen(width)
            slots = torch.arange(book.width)
            missing = (slots >= book.reserved.host[..., None]) & (slots < after[..., None])
            laid = torch.arange(missing.numel()).view(missing.shape)[missing]
            book.ids.host[missing] = self.pool.take(len(laid), book.alive(), laid).int()
            book.reserved.host.copy_(torch.maximum(book.reserved.host, after))
            self.runs = self._in_runs()
        book.publish()
        return before != (book.width, self.pool.capacity, self.runs)

    def _lay_out(self, width: int) -> None:
        """Replace the pool by one in which each row and head has ``width`` tiles, one after the other."""
        book, live = self.book, self.book.live()
        source = book.ids.host[:, :, : live.shape[2]][live].long()
        book.widen(width)
        laid = torch.arange(book.ids.host.numel(), dtype=torch.int32).view(book.ids.host.shape)
        self.pool.grow(laid.numel(), source, laid[:, :, : live.shape[2]][live].long())
        book.ids.host.copy_(laid)
        book.reserved.host.fill_(width)

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
        wanted = torch.zeros_like(self.book.used.host)
        wanted[rows] = self.present(filled > 0).sum(-1).int()
        self._make_room(wanted)
        block = max(4, -(-new // 8))
        for first in range(0, new, block):
            part = slice(first * self.tile, min((first + block) * self.tile, width))
            piece = _piece(tokens, index, part, rows)
            packed_k = self.codec.encode(self.tier.keys, piece.keys)
            packed_v = self.codec.encode(self.tier.values, piece.values)
            fields = {f"k.{n}": f for n, f in packed_k.fields.items()}
            fields |= {f"v.{n}": f for n, f in packed_v.fields.items()}
            self._enter(rows, filled[..., first : first + block], fields, piece)
        self._changed()

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
        self.aligned = self.aligned and bool((moving == moving[:, :1]).all())
        if not bool((touched & kept).any()):
            self._keep_tiles(kept.cpu())
        else:
            self._keep_tokens(staying)
        self.release()
        return taken

    def crop(self, end: int) -> None:
        """Forget every token at position ``end`` or later (``end`` int, logical)."""
        if not self.tiles:
            return
        positions = self.positions().cpu().unflatten(-1, (-1, self.tile))
        counts = ((positions >= 0) & (positions < end)).sum(-1)
        if torch.equal(counts, self.counts):
            return
        self.book.counts.host[:, :, : counts.shape[2]] = counts.int()
        self._keep_tiles(counts > 0)
        self.release()

    def select_rows(self, index: Tensor) -> None:
        """Keep, repeat or reorder rows: row ``i`` becomes what row ``index[i]`` was. Tiles are shared, not copied."""
        rows = self.book.used.host.shape[0]
        self.book.select_rows(index.cpu())
        self.release(resized=rows != len(index))

    def shift(self, by: int) -> None:
        """Every token is ``by`` (either sign) logical positions further on; positions must stay at least 0."""
        positions = self.book.notes["positions"] if self.book.starts is None else self.book.starts
        positions.add_(by)

    def join(self, other: TierStore) -> None:
        """Put copies of ``other``'s rows behind one's own; tiles that its rows share stay shared.

        Args:
            other: a store of an equal tier on the same device, left as it is but for how it notes positions.
        """
        if self.explicit or other.explicit:
            self.spell_positions()
            other.spell_positions()
        theirs = other.table
        live = theirs >= 0
        used, place = _numbered(theirs[live])
        ids = self.pool.write(other.pool.read(used.to(other.device)), self.book.alive())
        self.book.join(other.book, torch.full_like(theirs, -1).masked_scatter(live, ids[place]))
        self.aligned = self.aligned and other.aligned
        self.release(resized=True)

    def release(self, resized: bool = False) -> None:
        """Free tiles that nobody holds any more, if they are many; a store of fixed size keeps them for others.

        Args:
            resized: there are more or fewer rows now, and a store of fixed size has room for those.
        """
        book = self.book
        used, place = _numbered(book.alive())
        if resized if self.fixed else len(used) < self.pool.capacity * 0.75:
            self.pool.keep(used)  # in the order of the table: they may be runs again
            held = torch.arange(book.width) < book.reserved.host[..., None]
            book.ids.host.masked_scatter_(held, place.int())
        if not self.fixed:
            book.trim()
        elif resized:
            book.widen(self.fixed)
            self.pool.grow(max(len(used), book.used.host.numel() * self.fixed))
        self._changed()

    def spell_positions(self) -> None:
        """Keep a position for every token from here on: a tile no longer holds consecutive ones."""
        book = self.book
        if book.starts is not None:
            slots = torch.arange(self.tile, device=self.device, dtype=torch.int32)
            book.notes = {"positions": book.starts[..., None] + slots, **book.notes}
            book.starts = None

    # --- a pass ---
    def snapshot(self) -> _Before:
        """What ``restore`` needs to take a pass back."""
        return _Before(self.book.used.host.clone(), {n: t.clone() for n, t in self.statistics.items()})

    def restore(self, before: _Before) -> None:
        """Be again as ``snapshot`` found it: tiles that came since are reserved, or free."""
        live = torch.arange(self.book.width) < before.used[..., None]
        self.book.counts.host.masked_fill_(~live, self.tile)
        self.book.used.host.copy_(before.used)
        for name, held in self.statistics.items():
            held.copy_(before.statistics[name])
        if self.fixed:
            self.book.level()
        else:
            self.book.reserved.host.copy_(before.used)
            self.book.ids.host.masked_fill_(~live, -1)
        self.release()

    # --- state for checkpoints ---
    def state(self) -> dict[str, Tensor]:
        """Tensors from which ``load`` rebuilds the store: its live tiles, renumbered, and the book; nothing of the rest."""
        table, valid = self.table, self.book.valid()
        live, slack, width = table >= 0, sent(~valid, self.device), table.shape[2]
        used, place = _numbered(table[live])
        tiles = sent(used, self.device)
        state = {f"pool.{n}": t.index_select(0, tiles) for n, t in self.pool.fields.items()}
        state |= {"table": torch.full_like(table, -1).masked_scatter(live, place), "counts": self.counts}
        starts, positions = self.book.starts, self.book.notes.get("positions")
        state["starts"] = torch.zeros_like(table) if starts is None else starts[:, :, :width].long().cpu() * live
        none = torch.empty((*table.shape[:2], 0, self.tile), dtype=torch.int32, device=self.device)
        state["offsets"] = none if positions is None else positions[:, :, :width].masked_fill(slack, -1)
        return state | {f"statistic.{n}": t.masked_fill(slack, 0) for n, t in self.statistics.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave, into an empty store; positions are kept as they are there."""
        if state["offsets"].shape[2]:
            self.spell_positions()
        table, counts, book = state["table"].cpu(), state["counts"].cpu(), self.book
        live, width = table >= 0, table.shape[2]
        tiles = {name: state[f"pool.{name}"].to(self.device) for name in self.pool.fields}
        count = next(iter(tiles.values())).shape[0]
        book.widen(width)
        laid = torch.arange(book.ids.host.numel()).view(book.ids.host.shape)[:, :, :width][live]
        wish = laid[torch.argsort(table[live], stable=True)] if len(laid) == count else None
        ids = self.pool.take(count, torch.empty(0, dtype=torch.long), wish)
        self.pool.put(ids, tiles)
        book.ids.host.fill_(-1)
        book.ids.host[:, :, :width][live] = ids[table[live]].int()
        book.counts.host.fill_(self.tile)
        book.counts.host[:, :, :width][live] = counts[live].int()
        for mirror in (book.used, book.reserved):
            mirror.host.copy_(live.sum(-1))
        starts = state["starts"].cpu()
        if book.starts is not None:
            book.starts[:, :, :width] = sent(starts, self.device, torch.int32)
        elif state["offsets"].shape[2]:
            book.notes["positions"][:, :, :width] = state["offsets"].to(self.device)
        elif width:
            slots = torch.arange(self.tile)
            book.notes["positions"][:, :, :width] = sent(starts[..., None] + slots, self.device, torch.int32)
        for name, held in self.statistics.items():
            held.copy_(state[f"statistic.{name}"])
        self.aligned = not self.explicit and bool((starts == starts[:, :1]).all() & (counts == counts[:, :1]).all())
        self._changed()

    # --- inside ---
    def _changed(self) -> None:
        """The host has changed the table: steps find it so."""
        self.runs = self._in_runs()
        self.book.publish()

    def _in_runs(self) -> bool:
        """Whether the pool can be read without the table."""
        return self.pool.capacity >= self.book.ids.host.numel() and self.book.runs()

    def _enter(self, rows: Tensor, filled: Tensor, fields: Mapping[str, Tensor], piece: Tokens) -> None:
        """Write the tiles of ``rows`` whose ``filled[b, H, n]`` is positive into reserved ones and enter them.

        Where the first position of consecutive ones is known (``piece.first``), the device is not asked.
        """
        book, short = self.book, -piece.positions.shape[-1] % self.tile
        tiled = torch.nn.functional.pad(piece.positions, (0, short), value=-1).unflatten(-1, (-1, self.tile))
        tiled = tiled.expand(-1, self.heads, -1, -1)[:, :, : filled.shape[2]]  # [b, H, n, tile]
        starts = None if piece.first is None else piece.first[..., None] + torch.arange(filled.shape[2]) * self.tile
        if starts is None and not self.explicit:
            known, slots = tiled.cpu(), torch.arange(self.tile)
            starts = known[..., 0]
            if bool(((known - starts[..., None] - slots) * (slots < filled[..., None])).any()):
                self.spell_positions()
        self.aligned = not self.explicit and self.aligned and bool((filled == filled[:, :1]).all())
        if self.aligned and starts is not None:
            self.aligned = bool((starts == starts[:, :1]).all())
        b, h, t = self.present(filled > 0).nonzero(as_tuple=True)
        db, dh, dt = (sent(index, self.device) for index in (b, h, t))
        row, slots = rows[b], book.used.host[rows[b], h].long() + t
        self.pool.put(book.ids.host[row, h, slots].long(), {name: field[db, dh, dt] for name, field in fields.items()})
        book.counts.host[row, h, slots] = filled[b, h, t].int()
        at = (sent(row, self.device), dh, sent(slots, self.device))
        if book.starts is None:
            book.notes["positions"][at] = tiled[db, dh, dt].int()
        elif starts is not None:
            book.starts[at] = sent(starts.expand_as(filled)[b, h, t], self.device, torch.int32)
        for name, held in self.book.notes.items():
            if name.startswith("statistic."):
                values = torch.nn.functional.pad(piece.statistics[name[10:]], (0, short)).unflatten(-1, (-1, self.tile))
                held[at] = values[db, dh, dt]
            elif name == "shift":
                held[at] = 0
        book.used.host.index_put_((row, h), torch.ones_like(row, dtype=torch.int32), accumulate=True)

    def _take(self, moving: Tensor, gone: Tensor) -> Tokens:
        """The tokens ``moving``, decoded; ``gone`` ``[B, H_kv]`` of each row and head."""
        width = -(-int(gone.max()) // self.tile) * self.tile
        tiled, view = moving.unflatten(-1, (-1, self.tile)), self.view()
        single = self.tier.keys.moves_tokens and self.tier.values.moves_tokens
        if single:
            index = by_position(moving, self.positions())[..., :width]
            keys = self.tier.keys.select(view.packed_keys(), index)
            values = self.tier.values.select(view.packed_values(), index)
        else:
            touched = self.present(tiled.any(-1))
            order = left_pack(touched)[..., : max(1, int(touched.sum(-1).max()))]
            some = view.chosen(order)
            keys, values = some.packed_keys(), some.packed_values()
            index = (order[..., None] * self.tile + torch.arange(self.tile, device=self.device)).flatten(2)
            inner = by_position(moving.gather(2, index), self.positions().gather(2, index))[..., : int(gone.max())]
            index = index.gather(2, inner)
        taken_k, taken_v = self.codec.decode(self.tier.keys, keys), self.codec.decode(self.tier.values, values)
        if not single:
            taken_k = taken_k.gather(2, inner[..., None].expand(-1, -1, -1, taken_k.shape[-1]))
            taken_v = taken_v.gather(2, inner[..., None].expand(-1, -1, -1, taken_v.shape[-1]))
        positions = self.positions().gather(2, index)
        statistics = {n: t.flatten(2).gather(2, index) for n, t in self.statistics.items()}
        return Tokens(taken_k, taken_v, positions, gone, statistics)

    def _keep_tiles(self, keep: Tensor) -> None:
        """Keep the tiles ``keep`` (bool ``[B, H_kv, tiles]``, CPU): only ids move."""
        counts = self.book.counts.host[:, :, : keep.shape[2]]
        counts.copy_(counts * keep)
        keep = self.present(keep)
        self.book.rearrange(left_pack(keep), keep.sum(-1))

    def _keep_tokens(self, staying: Tensor) -> None:
        """Regroup the tokens that stay into whole tiles; rows that lose nothing keep theirs."""
        self.spell_positions()
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
        view = self.view().rows(at)
        keys = self.tier.keys.select(view.packed_keys(), index)
        values = self.tier.values.select(view.packed_values(), index)
        positions = self.positions()[at].gather(2, index)
        statistics = {n: t[at].flatten(2).gather(2, index) for n, t in self.statistics.items()}
        fields = {f"k.{n}": f for n, f in keys.fields.items()} | {f"v.{n}": f for n, f in values.fields.items()}
        filled = (counts[..., None] - torch.arange(width // self.tile) * self.tile).clamp(0, self.tile)
        # the codes are copied: the rows' own tiles are free now, and the first to be taken again
        wanted = torch.zeros_like(self.book.used.host)
        wanted[rows] = self.present(filled > 0).sum(-1).int()
        for mirror in (self.book.used, self.book.reserved):
            mirror.host[rows] = 0
        self.book.ids.host[rows] = -1
        self._make_room(wanted)
        if bool((filled > 0).any()):
            self._enter(rows, filled, fields, Tokens(keys=positions, values=positions, positions=positions, counts=counts,
                                                     statistics=statistics))  # fmt: skip

    def _no_tokens(self) -> Tokens:
        batch = self.book.used.host.shape[0]
        empty = torch.empty((batch, self.heads, 0, self.tier.keys.head_dim), dtype=self.dtype, device=self.device)
        values = torch.empty((batch, self.heads, 0, self.tier.values.head_dim), dtype=self.dtype, device=self.device)
        none = torch.empty((batch, self.heads, 0), dtype=torch.long, device=self.device)
        statistics = {n: none.float() for n in self.names}
        return Tokens(empty, values, none, torch.zeros((batch, self.heads), dtype=torch.long), statistics)


def _numbered(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Each of ``ids`` ``[n]`` once, in the order in which they are first met, and the number of each entry's, ``[n]``."""
    found, place = torch.unique(ids, return_inverse=True)
    first = torch.full_like(found, len(ids)).scatter_reduce(0, place, torch.arange(len(ids)), "amin")
    order = torch.argsort(first)
    return found[order], torch.argsort(order)[place]


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
