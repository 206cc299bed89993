"""Whose tiles are whose: pool ids, live tokens and positions of every tile of a row and head."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from fade_core.storage.mirror import Mirror
from fade_core.support.transfer import sent


class TileTable:
    """The block table of a tier: row ``b`` and head ``h`` have tiles ``ids[b, h, n]``, of which ``used[b, h]`` are written.

    The ones after them up to ``reserved[b, h]`` are this row's and head's own, for the next tiles that are encoded; heads of
    a row have the same number of those. Numbers are int32. Within a tile positions ascend.

    Args:
        batch: rows ``B``.
        heads: KV heads ``H_kv``.
        width: tiles ``T`` that a row and head has entries for.
        tile: tokens of a tile.
        device: where kernels read.
        notes: dtype of each number that is kept a token; "positions" among them where a tile's tokens need not follow one
            another.

    Attributes:
        ids: pool tiles ``[B, H_kv, T]``, -1 for none.
        used: tiles in use ``[B, H_kv]``.
        reserved: tiles in use or reserved ``[B, H_kv]``.
        counts: live tokens of each tile ``[B, H_kv, T]``, the first of it; the size of a tile where it is not in use.
        starts: position of the first token of each tile, int32 ``[B, H_kv, T]`` on the device; ``None`` if there are
            "positions".
        notes: numbers a token ``[B, H_kv, T, tile]`` on the device.
    """

    def __init__(
        self, batch: int, heads: int, width: int, tile: int, device: torch.device, notes: Mapping[str, torch.dtype]
    ) -> None:
        shape = (batch, heads, width)
        self.tile, self.device = tile, device
        self.ids = Mirror(torch.full(shape, -1, dtype=torch.int32), device)
        self.used, self.reserved = (Mirror(torch.zeros(shape[:2], dtype=torch.int32), device) for _ in range(2))
        self.counts = Mirror(torch.full(shape, tile, dtype=torch.int32), device)
        self.starts = None if "positions" in notes else torch.zeros(shape, dtype=torch.int32, device=device)
        self.notes = {name: torch.zeros((*shape, tile), dtype=kind, device=device) for name, kind in notes.items()}

    @property
    def width(self) -> int:
        """Tiles that a row and head has entries for."""
        return self.ids.host.shape[2]

    @property
    def tiles(self) -> int:
        """Tiles of the longest row and head."""
        return int(self.used.host.max()) if self.used.host.numel() else 0

    def live(self) -> Tensor:
        """bool ``[B, H_kv, tiles]`` on the CPU: tiles in use."""
        return torch.arange(self.tiles) < self.used.host[..., None]

    def valid(self) -> Tensor:
        """bool ``[B, H_kv, tiles, tile]`` on the CPU: live tokens."""
        live, slots = self.live(), torch.arange(self.tile)
        return live[..., None] & (slots < self.counts.host[:, :, : live.shape[2], None])

    def whole(self) -> bool:
        """Whether every tile in use is full."""
        tiles = self.tiles
        return bool(((self.counts.host[:, :, :tiles] == self.tile) | ~self.live()).all())

    def even(self) -> bool:
        """Whether all rows and heads have as many tiles."""
        used = self.used.host
        return not used.numel() or bool((used == used[0, 0]).all())

    def runs(self) -> bool:
        """Whether tile ``n`` of row ``b`` and head ``h`` is ``(b * H_kv + h) * T + n``, so that nobody needs to read ids."""
        ids = self.ids.host
        laid = torch.arange(ids.numel(), dtype=torch.int32).view(ids.shape)
        return bool(((ids == laid) | (torch.arange(self.width) >= self.reserved.host[..., None])).all())

    def alive(self) -> Tensor:
        """Ids that are in use or reserved, int64 on the CPU, row by row, head by head."""
        return self.ids.host[torch.arange(self.width) < self.reserved.host[..., None]].long()

    # --- changes; the caller publishes ---
    def widen(self, width: int) -> None:
        """Entries for ``width`` tiles, if there are fewer."""
        if width > self.width:
            self._resize(width)

    def trim(self) -> None:
        """Give back entries that nobody uses, if they are many."""
        needed = int(self.reserved.host.max()) if self.reserved.host.numel() else 0
        if self.width > needed + max(1, needed // 16):
            self._resize(needed)

    def _resize(self, width: int) -> None:
        more = width - self.width

        def sized(held: Tensor, fill: int = 0) -> Tensor:
            behind = (0, 0) * (held.dim() - 3)
            return pad(held, (*behind, 0, more), value=fill) if more > 0 else held[:, :, :width].clone()

        self.ids = Mirror(sized(self.ids.host, -1), self.device)
        self.counts = Mirror(sized(self.counts.host, self.tile), self.device)
        self.starts = None if self.starts is None else sized(self.starts)
        self.notes = {name: sized(note) for name, note in self.notes.items()}

    def rearrange(self, order: Tensor, used: Tensor) -> None:
        """Tile ``i`` of a row and head becomes what tile ``order[b, h, i]`` was; the first ``used[b, h]`` of them stay.

        Args:
            order: int64 ``[B, H_kv, n]`` on the CPU.
            used: ``[B, H_kv]`` on the CPU.
        """
        width = order.shape[2]
        slots, kept = sent(order, self.device), torch.arange(width) < used[..., None]
        ids, counts = self.ids.host.gather(2, order), self.counts.host.gather(2, order)
        self.ids.host.fill_(-1)
        self.ids.host[:, :, :width] = ids.masked_fill(~kept, -1)
        self.counts.host.fill_(self.tile)
        self.counts.host[:, :, :width] = counts.masked_fill(~kept, self.tile)
        if self.starts is not None:
            self.starts[:, :, :width] = self.starts.gather(2, slots)
        for note in self.notes.values():
            note[:, :, :width] = note.gather(2, slots[..., None].expand(-1, -1, -1, self.tile))
        self.used.host.copy_(used)
        self.reserved.host.copy_(used)

    def select_rows(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was, in place if their number stays; nothing is reserved after it."""
        at = sent(index, self.device)
        if len(index) == self.used.host.shape[0]:
            for mirror in (self.ids, self.used, self.counts):
                mirror.host.copy_(mirror.host[index])
            for held in (*self.notes.values(), *(() if self.starts is None else (self.starts,))):
                held.copy_(held[at])
            self.reserved.host.copy_(self.used.host)
        else:
            self.ids, self.used, self.counts = (
                Mirror(m.host[index], self.device) for m in (self.ids, self.used, self.counts)
            )
            self.reserved = Mirror(self.used.host.clone(), self.device)
            self.starts = None if self.starts is None else self.starts[at]
            self.notes = {name: note[at] for name, note in self.notes.items()}
        self.ids.host.masked_fill_(torch.arange(self.width) >= self.used.host[..., None], -1)

    def join(self, other: TileTable, ids: Tensor) -> None:
        """Put copies of ``other``'s rows, whose tiles are now ``ids`` ``[b, H_kv, n]``, behind one's own."""
        width = max(self.width, other.tiles)
        self.widen(width)

        def both(own: Tensor, theirs: Tensor, fill: int = 0) -> Tensor:
            behind = (0, 0) * (theirs.dim() - 3)
            return torch.cat([own, pad(theirs, (*behind, 0, width - theirs.shape[2]), value=fill)])

        tiles = other.tiles
        self.ids = Mirror(both(self.ids.host, ids.int(), -1), self.device)
        counts = other.counts.host[:, :, :tiles]
        self.counts = Mirror(both(self.counts.host, counts, self.tile), self.device)
        if self.starts is not None and other.starts is not None:
            self.starts = both(self.starts, other.starts[:, :, :tiles])
        self.notes = {name: both(note, other.notes[name][:, :, :tiles]) for name, note in self.notes.items()}
        used = other.used.host
        self.reserved = Mirror(torch.cat([self.reserved.host, used]), self.device)
        self.used = Mirror(torch.cat([self.used.host, used]), self.device)

    def level(self) -> None:
        """Give up what some heads of a row have reserved and others have not."""
        ahead = (self.reserved.host - self.used.host).amin(1, keepdim=True) if self.used.host.numel() else 0
        self.reserved.host.copy_(self.used.host + ahead)
        self.ids.host.masked_fill_(torch.arange(self.width) >= self.reserved.host[..., None], -1)

    def publish(self) -> None:
        """Write the host's numbers to the device."""
        for mirror in (self.ids, self.used, self.reserved, self.counts):
            mirror.publish()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        held: dict[str, Tensor] = {}
        for name in ("ids", "used", "reserved", "counts"):
            held |= getattr(self, name).tensors(name)
        return held | ({} if self.starts is None else {"starts": self.starts}) | self.notes
