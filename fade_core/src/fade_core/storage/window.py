"""The full-precision tokens of a layer: sink tokens first, then the recent window, written in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from fade_core.storage.mirror import Mirror
from fade_core.storage.slots import Slots, TokenLayout
from fade_core.support.transfer import sent

_GROWTH = 32
"""A full window grows by at least 1/32 of its size."""


class Window:
    """Left-aligned full-precision tokens; row ``b`` holds the first ``lengths[b]`` slots. All heads of a row are alike.

    Buffers are replaced only by what changes their size or their rows (``reserve``, ``shrink``, ``join``, other rows).

    Args:
        batch: rows ``B``.
        key_dim: channels of a key.
        value_dim: channels of a value.
        capacity: slots to start with.
        layout: heads, dtype, device, and what is kept of a token beside it.
        floor: slots that are never given back.

    Attributes:
        slots: "keys" ``[B, H_kv, capacity, D]``, "values", int32 "positions" ``[B, 1, capacity]``, and the notes.
        heads_aligned: whether all heads of a row hold tokens of the same positions: always.
        numbers: tokens of each row, int32 ``[B, H_kv]`` (one a program of a kernel, the same in all heads of a row).
    """

    heads_aligned = True

    def __init__(
        self, batch: int, key_dim: int, value_dim: int, capacity: int, layout: TokenLayout, floor: int = 0
    ) -> None:
        rows, device = (batch, layout.heads), layout.device
        keys, values = (
            torch.zeros((*rows, capacity, dim), dtype=layout.dtype, device=device) for dim in (key_dim, value_dim)
        )
        positions = torch.full((batch, 1, capacity), -1, dtype=torch.int32, device=device)
        tokens = {"keys": keys, "values": values, "positions": positions, **layout.notes((*rows, capacity))}
        self.slots = Slots(tokens, {"positions": -1})
        self.numbers = Mirror(torch.zeros(rows, dtype=torch.int32), device)
        self.floor = floor

    # --- what is here ---
    @property
    def keys(self) -> Tensor:
        """``[B, H_kv, capacity, D]``."""
        return self.slots["keys"]

    @property
    def values(self) -> Tensor:
        """``[B, H_kv, capacity, D_v]``."""
        return self.slots["values"]

    @property
    def positions(self) -> Tensor:
        """Logical position of each token, int32 ``[B, capacity]``; -1 past a row's length."""
        return self.slots["positions"][:, 0]

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Tracked statistics, float32 ``[B, H_kv, longest]`` a name; views."""
        return self.slots.statistics(self.longest)

    @property
    def capacity(self) -> int:
        """Slots a row."""
        return self.keys.shape[2]

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, int64 ``[B]`` on the CPU."""
        return self.numbers.host[:, 0].long()

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.numbers.host.max()) if self.numbers.host.numel() else 0

    def note(self, name: str) -> Tensor:
        """What each token carries by the names in ``slots``, ``[B, H_kv or 1, longest, ...]``; a view."""
        return self.slots[name][:, :, : self.longest]

    def decode(self, side: int) -> Tensor:
        """Keys (0) or values (1) ``[B, H_kv, longest, D]``, a view; slots past a row's length are finite but meaningless."""
        return (self.keys, self.values)[side][:, :, : self.longest]

    def decode_into(self, keys: Tensor, values: Tensor) -> None:
        """Write all tokens into buffers ``[B, H_kv, longest, D]``."""
        keys.copy_(self.decode(0))
        values.copy_(self.decode(1))

    def live_positions(self) -> Tensor:
        """int64 ``[B, 1, longest]``, -1 past a row's length."""
        positions, past = self.note("positions").long(), torch.arange(self.longest) >= self.lengths[:, None]
        return positions.masked_fill(sent(past, self.keys.device)[:, None], -1) if bool(past.any()) else positions

    # --- moving tokens ---
    def assign(self, tokens: Mapping[str, Tensor], lengths: Tensor) -> None:
        """Replace everything by the first ``lengths[b]`` (CPU) of left-aligned ``tokens``, by the names in ``slots``.

        Shifts are worked out anew after it, where they are kept.
        """
        count = int(lengths.max()) if len(lengths) else 0
        if count > self.capacity:
            self.slots.resize(count, 0)
        for name, new in tokens.items():
            self.slots[name][:, :, :count] = new[:, :, :count]
        self.set_lengths(lengths)

    def crop(self, end: int) -> None:
        """Forget every token at logical position ``end`` or later."""
        positions = self.live_positions()
        self.set_lengths(((positions >= 0) & (positions < end))[:, 0].sum(-1).cpu())

    def select_rows(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was; in place if their number stays."""
        lengths = self.lengths[index.cpu()]
        self.slots.select_rows(sent(index, self.keys.device))
        self.set_lengths(lengths)

    def shift(self, by: int) -> None:
        """Every token is ``by`` (either sign) logical positions further on; positions must stay at least 0."""
        self.positions.add_(by)
        self.set_lengths(self.lengths)

    def join(self, other: Window) -> None:
        """Put copies of ``other``'s rows (of the same layout and channels) behind one's own."""
        # what lies past the longest row of either stays behind
        self.slots.resize(max(self.capacity, other.longest), self.longest, (other.slots, other.longest))
        self.set_lengths(torch.cat([self.lengths, other.lengths]))

    def clear(self) -> None:
        """Hold no token; buffers stay where they are."""
        self.set_lengths(torch.zeros_like(self.lengths))

    def set_lengths(self, lengths: Tensor) -> None:
        """Say how many tokens each row holds, ``[B]`` on the CPU; positions past them are cleared."""
        self.numbers.replace(lengths[:, None].expand(-1, self.keys.shape[1]))
        self.numbers.publish()
        past = torch.arange(self.capacity, device=self.keys.device) >= self.numbers.device[:, :1]
        self.positions.masked_fill_(past, -1)

    # --- room ---
    def reserve(self, slots: int) -> None:
        """Make room for ``slots`` tokens a row, and a little more."""
        if slots > self.capacity:
            self.slots.resize(max(slots, self.capacity + self.capacity // _GROWTH), self.longest)

    def shrink(self, slots: int) -> None:
        """Give back room above ``slots`` that no token needs."""
        slots = max(slots, self.longest, self.floor)
        if slots < self.capacity:
            self.slots.resize(slots, self.longest)

    # --- what is held ---
    def snapshot(self) -> Callable[[], None]:
        """What takes a pass back: tokens and lengths are as they were then."""
        return partial(self.assign, {name: self.note(name).clone() for name in self.slots.tensors}, self.lengths)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        return self.slots.tensors | self.numbers.tensors("lengths")

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps: live tokens, zeros past a row's length, positions ``[B, longest]`` and lengths."""
        slack = self.live_positions()[..., None] < 0  # [B, 1, longest, 1]
        kept = {name: self.note(name) for name in self.slots.tensors if name != "shift"}
        state = {name: t.masked_fill(slack if t.dim() == 4 else slack[..., 0], 0) for name, t in kept.items()}
        return state | {"positions": self.live_positions()[:, 0].int(), "lengths": self.lengths}
