"""Packed tokens in buffers that never move, some of which are evicted: those that stay close the gaps, in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fade_core.errors import CheckpointError, InputError
from fade_core.storage.fixedstore import FixedStore
from fade_core.storage.tier_store import Tokens, by_position, left_pack
from fade_core.support.transfer import sent


class EvictingStore(FixedStore):
    """Tiles of one tier in buffers of one size, ragged over rows and heads: a head keeps the tokens that it ranks highest.

    A row and head always holds whole tiles, the first ``per_head`` of it, in order of position. Positions and statistics of
    its tokens lie on the device beside the codes, where decode steps write those of the tiles that they encode. Without
    ``explicit`` all heads of a row keep tokens of the same positions. Nothing is evicted between ``hold`` and ``go_back``.

    Attributes:
        held_offsets: int32 ``[B, H_kv, max_tiles, tile]``: position of each token; anything where there is none.
        held_statistics: name to float32 of that shape.
    """

    def _forget(self, batch: int) -> None:
        shape = (batch, self.heads, self.max_tiles, self.tile)
        self.held_offsets = torch.full(shape, -1, dtype=torch.int32, device=self.device)
        self.held_statistics = {name: torch.zeros(shape, device=self.device) for name in self.names}
        super()._forget(batch)

    def occupy(self, per_head: Tensor, first: Tensor | None = None) -> None:
        """Say on the host how many tiles each row and head uses, int64 ``[B, H_kv]``."""
        super().occupy(per_head, first)
        self.offsets = self.held_offsets[:, :, : self.tiles]
        self.statistics = {name: held[:, :, : self.tiles] for name, held in self.held_statistics.items()}

    # --- what is here ---
    @property
    def alike(self) -> bool:
        return not self.explicit

    def positions(self) -> Tensor:
        found, valid = self.offsets.flatten(2).long(), self.valid()
        return found if valid is None else found.masked_fill(~valid, -1)

    def tensors(self) -> dict[str, Tensor]:
        held = super().tensors() | {"positions": self.held_offsets}
        return held | {f"statistic.{name}": tensor for name, tensor in self.held_statistics.items()}

    # --- moving tokens ---
    def append(self, tokens: Tokens, index: Tensor | None = None) -> None:
        """Encode whole tiles behind what is here. Raises ``InputError`` if there is no room for them."""
        new = tokens.counts // self.tile
        if bool((tokens.counts != new * self.tile).any()):
            raise InputError("tiles of fixed places take whole tiles of tokens")
        self._check_room(self.per_head + new)
        most = int(new.max())
        block = max(4, -(-most // 8))
        for start in range(0, most, block):
            part = slice(start * self.tile, min(start + block, most) * self.tile)
            notes = {"positions": tokens.positions} | {f"s.{name}": tokens.statistics[name] for name in self.names}
            tiled = {
                name: _taken(note, index, part, self.heads).unflatten(2, (-1, self.tile))
                for name, note in notes.items()
            }
            for side, quantizer, held in (("k", self.tier.keys, tokens.keys), ("v", self.tier.values, tokens.values)):
                encoded = self.codec.encode(quantizer, _taken(held, index, part, self.heads))
                tiled |= {f"{side}.{name}": field for name, field in encoded.fields.items()}
            self._put(tiled, start, new)
        self.occupy(self.per_head + new)

    def _put(self, tiled: Mapping[str, Tensor], start: int, new: Tensor) -> None:
        """Write tiles ``[B, H_kv, n, ...]``, the new ones from ``start`` on, behind those that are there."""
        count = tiled["positions"].shape[2]
        row, head, number = (torch.arange(start, start + count) < new[..., None]).nonzero(as_tuple=True)
        slot = self.per_head[row, head] + start + number
        at, h, to, source = (sent(t, self.device) for t in (row, head, slot, number))
        for name, held in self._everything().items():
            held[at, h, to] = tiled[name][at, h, source].to(held.dtype)

    def _everything(self) -> dict[str, Tensor]:
        """All that is kept of tiles, ``[B, H_kv, max_tiles, ...]``: fields, positions, and statistics as "s.name"."""
        statistics = {f"s.{name}": held for name, held in self.held_statistics.items()}
        return {"positions": self.held_offsets, **statistics, **self.fields}

    def split(self, moving: Tensor, decode: bool = True) -> Tokens | None:
        """Evict the tokens ``moving`` (bool ``[B, H_kv, tiles * tile]``), whole tiles of them in each row and head.

        Codes of the tokens that stay are not touched; they move forward to whole tiles, in order of position.

        Raises:
            InputError: if ``decode`` is asked for (there is no tier to go to), or for another number of tokens.
        """
        if decode:
            raise InputError("tokens of fixed places can only be evicted; create the cache without max_cache_len")
        live = self.valid()
        staying = ~moving if live is None else live & ~moving
        counts = staying.sum(-1).cpu()
        if bool((counts % self.tile).any()):
            raise InputError(f"tiles of fixed places are given up in multiples of {self.tile} tokens a row and head")
        if torch.equal(counts, self.per_head * self.tile):
            return None
        after = counts // self.tile
        width, parted = int(after.max()), staying.unflatten(-1, (-1, self.tile))
        if bool((parted.any(-1) & ~parted.all(-1)).any()):
            self._close(by_position(staying, self.positions())[..., : width * self.tile])
        else:
            order = left_pack(parted.any(-1))[..., :width]
            for held in self._everything().values():
                moved = held.gather(
                    2, order.view(*order.shape, *(1,) * (held.dim() - 3)).expand(-1, -1, -1, *held.shape[3:])
                )
                held[:, :, :width] = moved
        self.occupy(after)
        return None

    def _close(self, index: Tensor) -> None:
        """Leave the tokens ``index`` (int64 ``[B, H_kv, n * tile]``) of each row and head, in this order."""
        width = index.shape[-1] // self.tile
        for side, quantizer, packed in (
            ("k", self.tier.keys, self.packed_keys()),
            ("v", self.tier.values, self.packed_values()),
        ):
            for name, field in quantizer.select(packed, index).fields.items():
                self.fields[f"{side}.{name}"][:, :, :width] = field
        for held in (self.held_offsets, *self.held_statistics.values()):
            held[:, :, :width] = held[:, :, : self.tiles].flatten(2).gather(2, index).unflatten(2, (-1, self.tile))

    def kept(self, end: int) -> Tensor:
        """Tiles of each row and head that lie before position ``end``. Raises ``InputError`` for one that reaches past it."""
        valid, positions = self.counts > 0, self.offsets.cpu()
        before = (positions < end).sum(-1) * valid
        if bool(((before > 0) & (before < self.tile)).any()):
            raise InputError(
                f"the tokens from position {end} on cannot be taken back: some share a packed tile with older ones, and "
                "a cache of fixed size that evicts cannot open it. Create the cache without max_cache_len"
            )
        return (before > 0).sum(-1)

    def crop(self, end: int) -> None:
        """Forget every tile at position ``end`` or further. Raises ``InputError`` as ``kept`` does."""
        self.occupy(self.kept(end))

    def select_rows(self, index: Tensor) -> None:
        at = sent(index, self.device)
        if len(index) == len(self.per_head):
            for held in (self.held_offsets, *self.held_statistics.values()):
                held.copy_(held[at])
        else:
            self.held_offsets = self.held_offsets[at]
            self.held_statistics = {name: held[at] for name, held in self.held_statistics.items()}
        super().select_rows(index)

    # --- state for checkpoints ---
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave. Raises ``CheckpointError`` for tokens that such a store cannot hold."""
        table, counts, starts = (state[name].cpu() for name in ("table", "counts", "starts"))
        per_head = (counts > 0).sum(-1)
        live = torch.arange(table.shape[2]) < per_head[..., None]
        if not torch.equal(counts, live * self.tile) or table.shape[2] > self.max_tiles:
            raise CheckpointError(
                f"a cache of fixed size holds up to {self.max_tiles} whole tiles a row and head here; what was saved is "
                "something else: load it into a cache without max_cache_len"
            )
        self._load_fields(state, table, live)
        tiles = table.shape[2]
        if state["offsets"].shape[2]:
            self.held_offsets[:, :, :tiles] = state["offsets"].to(self.device)
        else:
            self.held_offsets[:, :, :tiles] = (starts[..., None] + torch.arange(self.tile)).to(self.device, torch.int32)
        for name, held in self.held_statistics.items():
            held[:, :, :tiles] = state[f"statistic.{name}"].to(self.device)
        self.occupy(per_head)


def _taken(held: Tensor, index: Tensor | None, part: slice, heads: int) -> Tensor:
    """Tokens ``part`` of ``[B, H_kv or 1, T, ...]``, or those that ``index`` picks from it."""
    if index is None:
        return held[:, :, part].expand(-1, heads, *(-1,) * (held.dim() - 2))
    chosen = index[:, :, part]
    wide = chosen.view(*chosen.shape, *(1,) * (held.dim() - 3)).expand(*chosen.shape, *held.shape[3:])
    return held.expand(-1, heads, *held.shape[2:]).gather(2, wide)
