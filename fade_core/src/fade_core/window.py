"""The full-precision tokens of a layer: sink tokens first, then the recent window, in one growing buffer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Window:
    """Left-aligned full-precision tokens; row ``b`` holds the first ``lengths[b]`` slots. All heads of a row are alike.

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
            slots = (self.lengths[:, None] + torch.arange(count)).to(keys.device)
            rows = torch.arange(keys.shape[0], device=keys.device)[:, None]
            self.keys.transpose(1, 2)[rows, slots] = keys.transpose(1, 2)
            self.values.transpose(1, 2)[rows, slots] = values.transpose(1, 2)
            self.offsets[rows, slots] = torch.arange(position, position + count, device=keys.device).int().expand_as(slots)
            for held in self.statistics.values():
                held.transpose(1, 2)[rows, slots] = 0
        self._set_lengths(self.lengths + count)

    def assign(
        self, keys: Tensor, values: Tensor, positions: Tensor, lengths: Tensor, statistics: Mapping[str, Tensor]
    ) -> None:
        """Replace everything by left-aligned ``[B, H_kv, T, D]`` tokens at ``positions`` ``[B, T]``."""
        count = int(lengths.max())
        self.reserve(count)
        self.keys[:, :, :count] = keys[:, :, :count]
        self.values[:, :, :count] = values[:, :, :count]
        inside = torch.arange(count) < lengths[:, None]
        self.offsets.fill_(-1)
        self.offsets[:, :count] = torch.where(inside.to(positions.device), positions[:, :count].int(), -1)
        for name, held in self.statistics.items():
            held[:, :, :count] = statistics[name][:, :, :count]
        self._set_lengths(lengths.clone())

    def take_out(self, start: int, counts: Tensor) -> None:
        """Remove ``counts[b]`` tokens of each row from slot ``start`` on and close the gap."""
        if bool((counts == counts[0]).all()):
            gone = int(counts[0])
            if not gone:
                return
            for held in (self.keys, self.values, *self.statistics.values()):
                held[:, :, start : self.longest - gone] = held[:, :, start + gone : self.longest].clone()
            self.offsets[:, start : self.longest - gone] = self.offsets[:, start + gone : self.longest].clone()
            self.offsets[:, self.longest - gone :] = -1
        else:
            slots = torch.arange(self.longest)
            source = torch.where(slots < start, slots, slots + counts[:, None]).clamp_max(self.longest - 1)
            at = source.to(self.keys.device)
            wide = at[:, None, :, None]
            live = slice(0, self.longest)
            self.keys[:, :, live] = self.keys[:, :, live].gather(2, wide.expand(-1, *self.keys.shape[1:2], -1, self.keys.shape[-1]))
            self.values[:, :, live] = self.values[:, :, live].gather(
                2, wide.expand(-1, *self.values.shape[1:2], -1, self.values.shape[-1])
            )
            for held in self.statistics.values():
                held[:, :, live] = held[:, :, live].gather(2, at[:, None].expand(-1, held.shape[1], -1))
            kept = slots < (self.lengths - counts)[:, None]
            self.offsets[:, live] = self.offsets[:, live].gather(1, at).masked_fill(~kept.to(at.device), -1)
        self._set_lengths(self.lengths - counts)

    def crop(self, end: int) -> None:
        """Forget every token at logical position ``end`` or later."""
        kept = ((self.offsets >= 0) & (self.offsets < end)).sum(-1).cpu()
        self.offsets.masked_fill_(self.offsets >= end, -1)
        self._set_lengths(kept)

    def select_rows(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was."""
        at = index.to(self.keys.device)
        self.keys, self.values, self.offsets = self.keys[at], self.values[at], self.offsets[at]
        self.statistics = {n: t[at] for n, t in self.statistics.items()}
        self._set_lengths(self.lengths[index.cpu()])

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

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        held = {"keys": self.keys, "values": self.values, "positions": self.offsets, "lengths": self.lengths}
        return held | {f"statistic.{n}": t for n, t in self.statistics.items()}

    def state(self) -> dict[str, Tensor]:
        """Tensors from which ``load`` rebuilds the window."""
        return self.tensors()

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave."""
        device = self.keys.device
        self.keys, self.values = state["keys"].to(device).clone(), state["values"].to(device).clone()
        self.offsets = state["positions"].to(device).clone()
        self.statistics = {n: state[f"statistic.{n}"].to(device).clone() for n in self.statistics}
        self._set_lengths(state["lengths"].cpu().clone())

    def _resize(self, slots: int) -> None:
        kept = min(slots, self.capacity)

        def moved(held: Tensor, dim: int, fill: int) -> Tensor:
            shape = list(held.shape)
            shape[dim] = slots
            fresh = held.new_full(shape, fill)
            fresh.narrow(dim, 0, kept).copy_(held.narrow(dim, 0, kept))
            return fresh

        self.keys, self.values = moved(self.keys, 2, 0), moved(self.values, 2, 0)
        self.offsets = moved(self.offsets, 1, -1)
        self.statistics = {n: moved(t, 2, 0) for n, t in self.statistics.items()}

    def _set_lengths(self, lengths: Tensor) -> None:
        self.lengths = lengths
        self.longest = int(lengths.max()) if lengths.numel() else 0
        self.even = bool((lengths == self.longest).all())
