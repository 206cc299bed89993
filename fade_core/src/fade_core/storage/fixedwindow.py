"""The full-precision tokens of a layer whose buffers never move: the window of the compiled path."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.storage.window import Window
from fade_core.support.transfer import sent


@dataclass(frozen=True)
class _Copy:
    """What a window held, at one moment."""

    keys: Tensor
    values: Tensor
    offsets: Tensor
    statistics: dict[str, Tensor]
    lengths: Tensor


class FixedWindow(Window):
    """A window in buffers of one size: everything is written in place, nothing is ever replaced.

    The host's ``lengths`` have a copy on the device, ``device_lengths``, int32 ``[B, H_kv]`` (one a program of a kernel,
    the same in all heads of a row); a decode step changes that copy
    alone, and ``locate`` brings the host up to it.
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
        super().__init__(batch, heads, key_dim, value_dim, capacity, dtype, device, statistics)
        self.device_lengths = torch.zeros((batch, heads), dtype=torch.int32, device=device)
        self._copy: _Copy | None = None

    def publish(self) -> None:
        """Write the host's lengths to the device."""
        self.device_lengths.copy_(sent(self.lengths, self.keys.device)[:, None].expand_as(self.device_lengths))

    def locate(self, lengths: Tensor, first: Tensor, sinks: int, packed: Tensor) -> None:
        """Take over what decode steps have made of the window.

        Args:
            lengths: tokens of each row, int64 ``[B]`` on the CPU.
            first: position of each row's first token, likewise.
            sinks: leading tokens that stay where they are.
            packed: tokens of each row that lie, packed, between sinks and window, likewise.
        """
        slots = torch.arange(self.capacity)
        where = first[:, None] + slots + packed[:, None] * (slots >= sinks)
        self.offsets.copy_(sent(where.masked_fill(slots >= lengths[:, None], -1), self.offsets.device))
        self._set_lengths(lengths)

    def take_lengths(self, lengths: Tensor) -> None:
        """Take over how many tokens decode steps have left in the window; where they lie, the steps have written."""
        self._set_lengths(lengths)

    def assign(
        self, keys: Tensor, values: Tensor, positions: Tensor, lengths: Tensor, statistics: Mapping[str, Tensor]
    ) -> None:
        count = int(lengths.max())
        self.reserve(count)
        inside = sent(torch.arange(count) < lengths[:, None], positions.device)
        self.keys[:, :, :count], self.values[:, :, :count] = keys[:, :, :count], values[:, :, :count]
        self.offsets.fill_(-1)
        self.offsets[:, :count] = torch.where(inside, positions[:, :count].int(), -1)
        for name, held in self.statistics.items():
            held[:, :, :count] = statistics[name][:, :, :count]
        self._set_lengths(lengths.clone())

    def crop(self, end: int) -> None:
        self.offsets.masked_fill_(self.offsets >= end, -1)
        self._set_lengths((self.offsets >= 0).sum(-1).cpu())

    def select_rows(self, index: Tensor) -> None:
        at = sent(index, self.keys.device)
        if len(at) == self.keys.shape[0]:
            for held in (self.keys, self.values, self.offsets, *self.statistics.values()):
                held.copy_(held[at])
        else:
            self.keys, self.values, self.offsets = self.keys[at], self.values[at], self.offsets[at]
            self.statistics = {name: held[at] for name, held in self.statistics.items()}
            self.device_lengths = self.device_lengths[at]
        self._set_lengths(self.lengths[index.cpu()])

    def clear(self) -> None:
        """Hold no token."""
        self.offsets.fill_(-1)
        self._set_lengths(torch.zeros_like(self.lengths))
        self.publish()

    def reserve(self, slots: int) -> None:
        """Raises ``InputError`` if ``slots`` tokens do not fit."""
        if slots > self.capacity:
            raise InputError(
                f"a window of fixed size holds {self.capacity} tokens in full precision, and {slots} are wanted; "
                "create the cache without max_cache_len"
            )

    def shrink(self, slots: int) -> None:
        return

    # --- undoing a forward pass ---
    def hold(self) -> None:
        statistics = {name: held.clone() for name, held in self.statistics.items()}
        self._copy = _Copy(self.keys.clone(), self.values.clone(), self.offsets.clone(), statistics, self.lengths)

    def let_go(self) -> None:
        self._copy = None

    def go_back(self) -> None:
        if self._copy is None:
            return
        before, self._copy = self._copy, None
        self.keys.copy_(before.keys)
        self.values.copy_(before.values)
        self.offsets.copy_(before.offsets)
        for name, held in self.statistics.items():
            held.copy_(before.statistics[name])
        self._set_lengths(before.lengths)

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"device.lengths": self.device_lengths}
