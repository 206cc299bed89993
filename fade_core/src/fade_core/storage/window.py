"""The full-precision tokens of a layer: sink tokens first, then the recent window, written in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.storage.mirror import Mirror
from fade_core.support.transfer import sent

_GROWTH = 32
"""A full window grows by at least 1/32 of its size."""


@dataclass(frozen=True)
class _Before:
    """What a window held when a pass began."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    notes: dict[str, Tensor]
    lengths: Tensor


class Window:
    """Left-aligned full-precision tokens; row ``b`` holds the first ``lengths[b]`` slots. All heads of a row are alike.

    Buffers are replaced only by what changes their size or their rows (``reserve``, ``shrink``, ``join``, other rows).

    Args:
        batch: rows ``B``.
        heads: KV heads ``H_kv``.
        key_dim: channels of a key.
        value_dim: channels of a value.
        capacity: slots to start with.
        dtype: the model's dtype.
        device: where tokens live.
        statistics: tracked statistics to keep a token.
        shifted: whether each token carries how far it is moved when it is read (contiguous re-positioning).
        floor: slots that are never given back.

    Attributes:
        keys: ``[B, H_kv, capacity, D]``.
        values: ``[B, H_kv, capacity, D_v]``.
        offsets: int32 ``[B, capacity]``, logical position of each token; anything past a row's length.
        notes: further numbers a token, ``[B, H_kv, capacity]``: float32 "statistic.NAME", int32 "shift".
        numbers: tokens of each row, int32 ``[B, H_kv]`` (one a program of a kernel, the same in all heads of a row).
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
        shifted: bool = False,
        floor: int = 0,
    ) -> None:
        self.keys = torch.zeros((batch, heads, capacity, key_dim), dtype=dtype, device=device)
        self.values = torch.zeros((batch, heads, capacity, value_dim), dtype=dtype, device=device)
        self.offsets = torch.full((batch, capacity), -1, dtype=torch.int32, device=device)
        kinds = {f"statistic.{name}": torch.float32 for name in statistics}
        kinds |= {"shift": torch.int32} if shifted else {}
        self.notes = {name: torch.zeros((batch, heads, capacity), dtype=d, device=device) for name, d in kinds.items()}
        self.numbers = Mirror(torch.zeros((batch, heads), dtype=torch.int32), device)
        self.floor = floor

    # --- what is here ---
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

    @property
    def even(self) -> bool:
        """Whether all rows hold as many."""
        lengths = self.numbers.host[:, 0]
        return len(lengths) < 2 or bool((lengths == lengths[0]).all())

    @property
    def statistics(self) -> dict[str, Tensor]:
        """Tracked statistics, float32 ``[B, H_kv, capacity]`` a name."""
        return {name[10:]: note for name, note in self.notes.items() if name.startswith("statistic.")}

    @property
    def size(self) -> int:
        """Slots that are read of each row: as many as the longest has tokens."""
        return self.longest

    @property
    def alike(self) -> bool:
        """Whether all heads of a row hold tokens of the same positions: always."""
        return True

    def decode(self, side: int) -> Tensor:
        """Keys (0) or values (1) ``[B, H_kv, longest, D]``, a view."""
        return self.live()[side]

    def decode_into(self, keys: Tensor, values: Tensor) -> None:
        """Write ``live()`` into buffers ``[B, H_kv, longest, D]``."""
        for out, held in zip((keys, values), self.live(), strict=True):
            out.copy_(held)

    def note(self, name: str) -> Tensor:
        """A number kept of each token, ``[B, H_kv, longest]``, a view."""
        return self.notes[name][:, :, : self.longest]

    def live(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H_kv, longest, D]``, views; slots past a row's length are finite but meaningless."""
        longest = self.longest
        return self.keys[:, :, :longest], self.values[:, :, :longest]

    def positions(self) -> Tensor:
        """int64 ``[B, 1, longest]``, -1 past a row's length."""
        positions, valid = self.offsets[:, None, : self.longest].long(), self.valid()
        return positions if valid is None else positions.masked_fill(~valid, -1)

    def valid(self) -> Tensor | None:
        """bool ``[B, 1, longest]``, or ``None`` if every row is full."""
        if self.even:
            return None
        return sent(torch.arange(self.longest) < self.lengths[:, None], self.keys.device)[:, None]

    def _everything(self) -> dict[str, Tensor]:
        """All that is kept a token, slots in dimension 2 (positions: 1)."""
        return {"keys": self.keys, "values": self.values, "positions": self.offsets, **self.notes}

    # --- moving tokens ---
    def assign(
        self, keys: Tensor, values: Tensor, positions: Tensor, lengths: Tensor, statistics: Mapping[str, Tensor]
    ) -> None:
        """Replace everything by left-aligned ``[B, H_kv, T, D]`` tokens at ``positions`` ``[B, T]``.

        Shifts are worked out anew after it, where they are kept.
        """
        count = int(lengths.max())
        if count > self.capacity:
            self._resize(count, keep=False)
        self.keys[:, :, :count], self.values[:, :, :count] = keys[:, :, :count], values[:, :, :count]
        inside = sent(torch.arange(count) < lengths[:, None], positions.device)
        self.offsets.fill_(-1)
        self.offsets[:, :count] = torch.where(inside, positions[:, :count].int(), -1)
        for name, held in self.statistics.items():
            held[:, :, :count] = statistics[name][:, :, :count]
        self.set_lengths(lengths)

    def take_out(self, start: int, counts: Tensor) -> None:
        """Remove ``counts[b]`` tokens of each row from slot ``start`` on and close the gap."""
        if not bool(counts.any()):
            return
        kept = self.lengths - counts
        slots = torch.arange(int(kept.max()))
        source = torch.where(slots < start, slots, slots + counts[:, None]).clamp_max(self.longest - 1)
        at = sent(source, self.keys.device)  # [B, kept]
        for name, held in self._everything().items():
            index = at if name == "positions" else at[:, None, :, None] if held.dim() == 4 else at[:, None]
            dim = 1 if name == "positions" else 2
            moved = held.gather(dim, index.expand(*held.shape[:dim], -1, *held.shape[dim + 1 :]))
            held.narrow(dim, 0, len(slots)).copy_(moved)
        self.offsets[:, len(slots) :] = -1
        self.set_lengths(kept)

    def crop(self, end: int) -> None:
        """Forget every token at logical position ``end`` or later."""
        self.set_lengths(((self.positions() >= 0) & (self.positions() < end))[:, 0].sum(-1).cpu())

    def drop_newest(self, count: int) -> None:
        """Forget the ``count`` newest tokens of each row."""
        self.set_lengths((self.lengths - count).clamp_min(0))

    def select_rows(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was; in place if their number stays."""
        at, lengths = sent(index, self.keys.device), self.lengths[index.cpu()]
        if len(at) == self.keys.shape[0]:
            for held in self._everything().values():
                held.copy_(held[at])
        else:
            self._replace({name: held[at] for name, held in self._everything().items()})
        self.set_lengths(lengths)

    def shift(self, by: int) -> None:
        """Every token is ``by`` (either sign) logical positions further on; positions must stay at least 0."""
        self.offsets.add_(by)
        self.set_lengths(self.lengths)

    def join(self, other: Window) -> None:
        """Put copies of ``other``'s rows (same heads, channels, dtype, device and notes) behind one's own."""
        slots = max(self.capacity, other.longest)
        theirs, joined = other._everything(), dict[str, Tensor]()
        for name, held in self._everything().items():
            dim = 1 if name == "positions" else 2
            shape = [*held.shape]
            shape[0], shape[dim] = held.shape[0] + theirs[name].shape[0], slots
            both = held.new_zeros(shape)  # what lies past the longest row of either stays behind
            both[: held.shape[0]].narrow(dim, 0, self.longest).copy_(held.narrow(dim, 0, self.longest))
            both[held.shape[0] :].narrow(dim, 0, other.longest).copy_(theirs[name].narrow(dim, 0, other.longest))
            joined[name] = both
        lengths = torch.cat([self.lengths, other.lengths])
        self._replace(joined)
        self.set_lengths(lengths)

    def clear(self) -> None:
        """Hold no token; buffers stay where they are."""
        self.set_lengths(torch.zeros_like(self.lengths))

    # --- room ---
    def reserve(self, slots: int) -> bool:
        """Make room for ``slots`` tokens a row, and a little more; says whether buffers were replaced."""
        if slots <= self.capacity:
            return False
        self._resize(max(slots, self.capacity + self.capacity // _GROWTH))
        return True

    def shrink(self, slots: int) -> None:
        """Give back room above ``slots`` that no token needs."""
        slots = max(slots, self.longest, self.floor)
        if slots < self.capacity:
            self._resize(slots)

    # --- a pass ---
    def snapshot(self) -> _Before:
        """What ``restore`` needs to take a pass back."""
        longest = self.longest
        return _Before(
            self.keys[:, :, :longest].clone(),
            self.values[:, :, :longest].clone(),
            self.offsets[:, :longest].clone(),
            {name: note[:, :, :longest].clone() for name, note in self.notes.items()},
            self.lengths,
        )

    def restore(self, before: _Before) -> None:
        """Be again as ``snapshot`` found it."""
        longest = before.keys.shape[2]
        if longest > self.capacity:
            self._resize(longest, keep=False)
        self.keys[:, :, :longest], self.values[:, :, :longest] = before.keys, before.values
        self.offsets[:, :longest] = before.positions
        for name, note in self.notes.items():
            note[:, :, :longest] = before.notes[name]
        self.set_lengths(before.lengths)

    # --- what is held ---
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        return self._everything() | self.numbers.tensors("lengths")

    def state(self) -> dict[str, Tensor]:
        """Tensors from which ``load`` rebuilds the window: live tokens, zeros past a row's length."""
        slack = (torch.arange(self.longest) >= self.lengths[:, None]).to(self.keys.device)[:, None]
        keys, values = (t.masked_fill(slack[..., None], 0) for t in self.live())
        state = {"keys": keys, "values": values, "positions": self.positions()[:, 0].int(), "lengths": self.lengths}
        return state | {
            f"statistic.{n}": t[:, :, : self.longest].masked_fill(slack, 0) for n, t in self.statistics.items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state`` gave."""
        moved = {name: tensor.to(self.keys.device) for name, tensor in state.items()}
        statistics = {n: moved[f"statistic.{n}"] for n in self.statistics}
        self.assign(moved["keys"], moved["values"], moved["positions"], state["lengths"].cpu(), statistics)

    def set_lengths(self, lengths: Tensor) -> None:
        """Say how many tokens each row holds, ``[B]`` on the CPU; positions past them are cleared."""
        if len(lengths) != len(self.numbers.host):
            self.numbers = Mirror(lengths[:, None].expand(-1, self.keys.shape[1]), self.keys.device)
        else:
            self.numbers.set(lengths[:, None].expand_as(self.numbers.host))
        past = torch.arange(self.capacity, device=self.keys.device) >= self.numbers.device[:, :1]
        self.offsets.masked_fill_(past, -1)

    def _resize(self, slots: int, keep: bool = True) -> None:
        """Buffers of ``slots``, with what is here if it is to be kept."""
        kept, resized = min(slots, self.longest) if keep else 0, dict[str, Tensor]()
        for name, held in self._everything().items():
            dim = 1 if name == "positions" else 2
            shape = [*held.shape]
            shape[dim] = slots
            resized[name] = held.new_full(shape, -1) if name == "positions" else held.new_zeros(shape)
            resized[name].narrow(dim, 0, kept).copy_(held.narrow(dim, 0, kept))
        self._replace(resized)

    def _replace(self, buffers: dict[str, Tensor]) -> None:
        self.keys, self.values, self.offsets = (buffers.pop(name) for name in ("keys", "values", "positions"))
        self.notes = buffers
