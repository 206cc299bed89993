"""The full-precision tokens of a layer: sink tokens first, then the recent window, in one growing buffer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.support.transfer import sent


@dataclass(frozen=True)
class _Held:
    """Buffers and lengths of a window, at one moment."""

    keys: Tensor
    values: Tensor
    offsets: Tensor
    statistics: dict[str, Tensor]
    lengths: Tensor


class Window:
    """Left-aligned full-precision tokens; row ``b`` holds the first ``lengths[b]`` slots. All heads of a row are alike.

    Only ``append`` writes into the buffers, and only past what is there; whatever moves tokens makes new ones. That is why
    ``hold`` can remember a moment without copying it.

    Args:
        batch: rows ``B``.
        heads: KV heads ``H_kv``.
        key_dim: channels of a key.
        value_dim: channels of a value.
        capacity: slots to start with; the buffer grows when they do not suffice.
        dtype: the model's dtype.
        device: where tokens live.
        statistics: tracked statistics to keep a token.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        key_dim: int,
        value_dim: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        statistics: tuple[str, ...] = (),
    ) -> None:
        self.keys = torch.zeros((batch, heads, capacity, key_dim), dtype=dtype, device=device)
        self.values = torch.zeros((batch, heads, capacity, value_dim), dtype=dtype, device=device)
        self.offsets = torch.full((batch, capacity), -1, dtype=torch.int32, device=device)
        self.statistics = {n: torch.zeros((batch, heads, capacity), device=device) for n in statistics}
        self.lengths = torch.zeros(batch, dtype=torch.long)
        self.longest, self.even = 0, True
        self._held: _Held | None = None

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.keys.shape[2]

    def live(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H_kv, longest, D]``, views; slots past a row's length are finite but meaningless."""
        return self.keys[:, :, : self.longest], self.values[:, :, : self.longest]

    def positions(self) -> Tensor:
        """int64 ``[B, 1, longest]``, -1 past a row's length."""
        return self.offsets[:, None, : self.longest].long()

    def valid(self) -> Tensor | None:
        """bool ``[B, 1, longest]``, or ``None`` if every row is full."""
        return None if self.even else self.offsets[:, None, : self.longest] >= 0

    def append(self, keys: Tensor, values: Tensor, position: int) -> None:
        """Add ``[B, H_kv, Q, D]`` at logical ``position`` and on, the same for every row."""
        count = keys.shape[2]
        if self.longest + count > self.capacity:
            self.reserve(max(self.longest + count, self.capacity + self.capacity // 16))
        if self.even:
            start, end = self.longest, self.longest + count
            self.keys[:, :, start:end] = keys
            self.values[:, :, start:end] = values
            self.offsets[:, start:end] = torch.arange(position, position + count, device=self.offsets.device)
            for held in self.statistics.values():
                held[:, :, start:end] = 0
        else:
            for held in (self.keys, self.values):
                held[:, :, self.longest : self.longest + count] = (
                    0  # attention reads shorter rows up to there, with weight 0
                )
            slots = sent(self.lengths[:, None] + torch.arange(count), keys.device)
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
            self.keys.transpose(1, 2)[rows, slots] = keys.transpose(1, 2)
            self.values.transpose(1, 2)[rows, slots] = values.transpose(1, 2)
            self.offsets[rows, slots] = (
                torch.arange(position, position + count, device=keys.device).int().expand_as(slots)
            )
            for held in self.statistics.values():
                held.transpose(1, 2)[rows, slots] = 0
        self._set_lengths(self.lengths + count)

    def assign(
        self, keys: Tensor, values: Tensor, positions: Tensor, lengths: Tensor, statistics: Mapping[str, Tensor]
    ) -> None:
        """Replace everything by left-aligned ``[B, H_kv, T, D]`` tokens at ``positions`` ``[B, T]``."""
        count = int(lengths.max())
        slots = max(count, self.capacity)
        inside = sent(torch.arange(count) < lengths[:, None], positions.device)
        self.keys, self.values = _padded(keys[:, :, :count], 2, slots), _padded(values[:, :, :count], 2, slots)
        self.offsets = _padded(torch.where(inside, positions[:, :count].int(), -1), 1, slots, -1)
        self.statistics = {n: _padded(statistics[n][:, :, :count], 2, slots) for n in self.statistics}
        self._set_lengths(lengths.clone())

    def take_out(self, start: int, counts: Tensor) -> None:
        """Remove ``counts[b]`` tokens of each row from slot ``start`` on and close the gap."""
        if not bool(counts.any()):
            return
        kept = self.lengths - counts
        slots = torch.arange(int(kept.max()))
        source = torch.where(slots < start, slots, slots + counts[:, None]).clamp_max(self.longest - 1)
        at = sent(source, self.keys.device)
        wide = at[:, None, :, None]
        self.assign(
            self.keys.gather(2, wide.expand(-1, self.keys.shape[1], -1, self.keys.shape[3])),
            self.values.gather(2, wide.expand(-1, self.values.shape[1], -1, self.values.shape[3])),
            self.offsets.gather(1, at),
            kept,
            {n: t.gather(2, at[:, None].expand(-1, t.shape[1], -1)) for n, t in self.statistics.items()},
        )

    def crop(self, end: int) -> None:
        """Forget every token at logical position ``end`` or later."""
        self.offsets = self.offsets.masked_fill(self.offsets >= end, -1)
        self._set_lengths((self.offsets >= 0).sum(-1).cpu())

    def select_rows(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was."""
        at = sent(index, self.keys.device)
        self.keys, self.values, self.offsets = self.keys[at], self.values[at], self.offsets[at]
        self.statistics = {n: t[at] for n, t in self.statistics.items()}
        self._set_lengths(self.lengths[index.cpu()])

    def shift(self, by: int) -> None:
        """Every token is ``by`` (either sign) logical positions further on; positions must stay at least 0."""
        self.offsets = torch.where(self.offsets >= 0, self.offsets + by, self.offsets)

    def join(self, other: Window) -> None:
        """Put copies of ``other``'s rows (same heads, channels, dtype, device and statistics) behind one's own."""
        slots = max(self.capacity, other.longest)

        def both(own: Tensor, theirs: Tensor, dim: int, fill: int = 0) -> Tensor:
            shape = list(own.shape)
            shape[0], shape[dim] = own.shape[0] + theirs.shape[0], slots
            joined = own.new_full(
                shape, fill
            )  # what lies past the longest row of either may be anything: it stays behind
            joined[: own.shape[0]].narrow(dim, 0, self.longest).copy_(own.narrow(dim, 0, self.longest))
            joined[own.shape[0] :].narrow(dim, 0, other.longest).copy_(theirs.narrow(dim, 0, other.longest))
            return joined

        self.keys, self.values = both(self.keys, other.keys, 2), both(self.values, other.values, 2)
        self.offsets = both(self.offsets, other.offsets, 1, -1)
        self.statistics = {n: both(t, other.statistics[n], 2) for n, t in self.statistics.items()}
        self._set_lengths(torch.cat([self.lengths, other.lengths]))

    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` tokens a row; buffers are replaced, contents kept."""
        extra = slots - self.capacity
        if extra <= 0:
            return
        self._resize(slots)

    def shrink(self, slots: int) -> None:
        """Give back room above ``slots`` that no token needs."""
        slots = max(slots, self.longest)
        if slots < self.capacity:
            self._resize(slots)

    # --- undoing a forward pass ---
    def hold(self) -> None:
        """Remember what is here until ``let_go``, so that ``go_back`` can return to it."""
        statistics = {n: t.clone() for n, t in self.statistics.items()}
        self._held = _Held(self.keys, self.values, self.offsets, statistics, self.lengths)

    def let_go(self) -> None:
        """Forget what ``hold`` remembered."""
        self._held = None

    def go_back(self) -> None:
        """Be again as ``hold`` found it."""
        if self._held is None:
            return
        held, self._held = self._held, None
        self.keys, self.values, self.statistics = held.keys, held.values, held.statistics
        outside = torch.arange(held.offsets.shape[1]) >= held.lengths[:, None]
        self.offsets = held.offsets.masked_fill(outside.to(held.offsets.device), -1)
        self._set_lengths(held.lengths)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        held = {"keys": self.keys, "values": self.values, "positions": self.offsets, "lengths": self.lengths}
        return held | {f"statistic.{n}": t for n, t in self.statistics.items()}

    def state(self) -> dict[str, Tensor]:
        """Tensors from which ``load`` rebuilds the window: live tokens, zeros past a row's length."""
        slack = (torch.arange(self.longest) >= self.lengths[:, None]).to(self.keys.device)[:, None]
        keys, values = (t.masked_fill(slack[..., None], 0) for t in self.live())
        state = {"keys": keys, "values": values, "positions": self.offsets[:, : self.longest], "lengths": self.lengths}
        return state | {
            f"statistic.{n}": t[:, :, : self.longest].masked_fill(slack, 0) for n, t in self.statistics.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave."""
        moved = {name: tensor.to(self.keys.device) for name, tensor in state.items()}
        statistics = {n: moved[f"statistic.{n}"] for n in self.statistics}
        self.assign(moved["keys"], moved["values"], moved["positions"], state["lengths"].cpu(), statistics)

    def _resize(self, slots: int) -> None:
        kept = min(slots, self.capacity)
        self.keys, self.values = _padded(self.keys[:, :, :kept], 2, slots), _padded(self.values[:, :, :kept], 2, slots)
        self.offsets = _padded(self.offsets[:, :kept], 1, slots, -1)
        self.statistics = {n: _padded(t[:, :, :kept], 2, slots) for n, t in self.statistics.items()}

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.longest = int(lengths.max()) if lengths.numel() else 0
        self.even = bool((lengths == self.longest).all())


def _padded(tensor: Tensor, dim: int, size: int, fill: int = 0) -> Tensor:
    """A copy of ``tensor`` with ``size`` entries along ``dim``."""
    shape = list(tensor.shape)
    shape[dim] = size
    copy = tensor.new_full(shape, fill)
    copy.narrow(dim, 0, tensor.shape[dim]).copy_(tensor)
    return copy
