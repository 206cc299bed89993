"""Whose tiles are whose: pool ids, live tokens and positions of every tile of a row and head."""

from __future__ import annotations

import torch
from torch import Tensor

from fade_core.storage.mirror import Mirror
from fade_core.storage.slots import Slots, TokenLayout, joined, left_pack
from fade_core.support.transfer import sent


class TileTable:
    """The block table of a tier: row ``b`` and head ``h`` have tiles ``ids[b, h, n]``, of which ``used[b, h]`` are written.

    The ones after them up to ``reserved[b, h]`` are this row's and head's own, for the next tiles that are encoded; heads of
    a row have the same number of those. Numbers are int32. Within a tile positions ascend. Who changes the host's numbers
    calls ``publish``.

    Args:
        batch: rows ``B``.
        width: tiles ``T`` that a row and head has entries for.
        tile: tokens of a tile.
        layout: heads, device, and what is kept of a token.
        stores_positions: whether each token has a position of its own; else those of a tile follow one another.
        heads_share_tiles: whether tile ``n`` of all heads of a row is there as long as one of them has tokens in it.

    Attributes:
        ids: pool tiles ``[B, H_kv, T]``, -1 for none.
        used: tiles in use ``[B, H_kv]``.
        reserved: tiles in use or reserved ``[B, H_kv]``.
        counts: live tokens of each tile ``[B, H_kv, T]``, the first of it; the size of a tile where it is not in use.
        slots: on the device: "starts", position of the first token of each tile, int32 ``[B, H_kv, T]``, or "positions",
            int32 ``[B, H_kv, T, tile]``; and the notes.
        shared: whether rows may have tiles in common.
    """

    def __init__(
        self, batch: int, width: int, tile: int, layout: TokenLayout, stores_positions: bool, heads_share_tiles: bool
    ) -> None:
        rows, device = (batch, layout.heads), layout.device
        self.tile, self.device, self.heads_share_tiles, self.shared = tile, device, heads_share_tiles, False
        self.ids, self.counts = (Mirror(torch.full((*rows, width), fill), device) for fill in (-1, tile))
        self.used, self.reserved = (Mirror(torch.zeros(rows), device) for _ in range(2))
        name, shape = ("positions", (*rows, width, tile)) if stores_positions else ("starts", (*rows, width))
        positions = torch.zeros(shape, dtype=torch.int32, device=device)
        self.slots = Slots({name: positions, **layout.notes((*rows, width, tile))})

    # --- what is here ---
    @property
    def starts(self) -> Tensor | None:
        """Position of the first token of each tile, ``[B, H_kv, T]``; ``None`` if each token has its own."""
        return self.slots.tensors.get("starts")

    @property
    def stores_positions(self) -> bool:
        """Whether each token has a position of its own."""
        return self.starts is None

    @property
    def width(self) -> int:
        """Tiles that a row and head has entries for."""
        return self.ids.device.shape[2]

    @property
    def tiles(self) -> int:
        """Tiles of the longest row and head."""
        return int(self.used.host.max()) if self.used.host.numel() else 0

    def live(self) -> Tensor:
        """bool ``[B, H_kv, tiles]`` on the CPU: tiles in use."""
        return torch.arange(self.tiles) < self.used.host[..., None]

    def live_ids(self) -> Tensor:
        """Pool ids of the tiles in use, int64 ``[B, H_kv, tiles]`` on the CPU, -1 for none."""
        return self.ids.host[:, :, : self.tiles].long().masked_fill(~self.live(), -1)

    def live_counts(self) -> Tensor:
        """Live tokens of each tile in use, int64 ``[B, H_kv, tiles]`` on the CPU, 0 for none."""
        return self.counts.host[:, :, : self.tiles].long() * self.live()

    def whole(self) -> bool:
        """Whether every tile in use is full."""
        return bool((self.counts.host == self.tile).all())

    def even(self) -> bool:
        """Whether all rows and heads have as many tiles."""
        return len(self.used.host.unique()) <= 1

    def runs(self) -> bool:
        """Whether tile ``n`` of row ``b`` and head ``h`` is ``(b * H_kv + h) * T + n``, so that nobody needs to read ids."""
        return bool(((self.ids.host == self.in_runs()) | ~self.held()).all())

    def in_runs(self) -> Tensor:
        """The ids of a table whose tiles lie in runs, int64 ``[B, H_kv, T]`` on the CPU."""
        return torch.arange(self.ids.device.numel()).view(self.ids.device.shape)

    def held(self) -> Tensor:
        """bool ``[B, H_kv, T]`` on the CPU: tiles in use or reserved."""
        return torch.arange(self.width) < self.reserved.host[..., None]

    def alive(self) -> Tensor:
        """Ids that are in use or reserved, int64 on the CPU, row by row, head by head."""
        return self.ids.host[self.held()].long()

    def present(self, wanted: Tensor) -> Tensor:
        """Tiles that are there if those of bool ``[B, H_kv, n]`` are wanted."""
        return wanted.any(1, keepdim=True).expand_as(wanted) if self.heads_share_tiles else wanted

    # --- changes ---
    def resize(self, width: int) -> None:
        """Entries for ``width`` tiles."""
        kept = min(width, self.width)
        for mirror, empty in ((self.ids, -1), (self.counts, self.tile)):
            mirror.replace(joined(width, empty, (mirror.host, kept)))
        self.slots.resize(width, kept)

    def use(self, used: Tensor) -> None:
        """Say that the first ``used`` tiles ``[B, H_kv]`` (CPU) of each row and head are in use, and no more reserved."""
        self.used.replace(used)
        self.reserved.replace(used)
        self.ids.host.masked_fill_(~self.held(), -1)
        self.counts.host.masked_fill_(~self.held(), self.tile)

    def keep(self, chosen: Tensor) -> None:
        """Keep the tiles ``chosen`` (bool ``[B, H_kv, tiles]``, CPU), in their order; only ids move."""
        width, present = chosen.shape[2], self.present(chosen)
        order = left_pack(present)
        self.counts.host[:, :, :width] *= chosen
        for mirror in (self.ids, self.counts):
            mirror.host[:, :, :width] = mirror.host.gather(2, order)
        self.slots.move(sent(order, self.device))
        self.use(present.sum(-1))

    def select_rows(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was, in place if their number stays; nothing is reserved after it."""
        for mirror in (self.ids, self.counts):
            mirror.replace(mirror.host[index])
        self.slots.select_rows(sent(index, self.device))
        self.shared = self.shared or len(index.unique()) < len(index)
        self.use(self.used.host[index])

    def join(self, other: TileTable, ids: Tensor) -> None:
        """Put copies of ``other``'s rows, whose tiles are now ``ids`` ``[b, H_kv, n]``, behind one's own."""
        width, own, tiles = max(self.width, other.tiles), self.width, other.tiles
        self.ids.replace(joined(width, -1, (self.ids.host, own), (ids, tiles)))
        self.counts.replace(joined(width, self.tile, (self.counts.host, own), (other.counts.host, tiles)))
        self.slots.resize(width, own, (other.slots, tiles))
        self.shared = self.shared or other.shared
        for mirror in (self.used, self.reserved):
            mirror.replace(torch.cat([mirror.host, other.used.host]))

    def store_positions(self) -> None:
        """Keep a position for every token from here on: a tile no longer holds consecutive ones."""
        if self.starts is not None:
            slots = torch.arange(self.tile, device=self.device, dtype=torch.int32)
            notes = {name: held for name, held in self.slots.tensors.items() if name != "starts"}
            self.slots.tensors = {"positions": self.starts[..., None] + slots, **notes}

    def publish(self) -> None:
        """Write the host's numbers to the device."""
        for mirror in (self.ids, self.used, self.reserved, self.counts):
            mirror.publish()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        named = {name: getattr(self, name).tensors(name) for name in ("ids", "used", "reserved", "counts")}
        return {name: held for mirrored in named.values() for name, held in mirrored.items()} | self.slots.tensors
