"""A stream that kernels read: planes of 16 slots, each of which holds two bits of some channel of some head."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fade_core.packed import WORD_BITS, Layout, pack_codes, unpack_codes
from fade_quant_rotated.lloyd_max import Levels
from fade_quant_rotated.streams import StreamLayout, padded, sent

PLANE_BITS = 2
PLANE_CHANNELS = 16
"""Slots of a plane, and words whose rows kernels read at once."""
NOTHING = 31
"""The shift of a slot that holds nothing: no bit of a code is that high."""


def in_planes(widths: Sequence[int], levels: Levels, group: int = 1) -> bool:
    """Whether codes of these widths are stored as planes: even widths that kernels read, or that come in whole planes."""
    return not any(width % PLANE_BITS for width in widths) and (levels == "uniform" or group % PLANE_CHANNELS == 0)


def fits_planes(widths: Tensor, levels: Levels, tile: int, row: int = 0) -> bool:
    """``in_planes`` of ``widths`` ``[H_kv, D]``, some of which are not 0, that fit into rows of ``row`` words (0: any)."""
    heads, bits = len(widths), int(widths.sum())
    if not bits or not in_planes(widths.unique().tolist(), levels, PLANE_CHANNELS if aligned(widths) else 1):
        return False
    planes = -(-bits // (PLANE_BITS * PLANE_CHANNELS))
    return not row or (not row % PLANE_CHANNELS and row_of(planes, heads, tile) <= row)


def aligned(widths: Tensor) -> bool:
    """Whether ``widths`` ``[H_kv, D]`` are alike over each 16 channels."""
    if widths.shape[-1] % PLANE_CHANNELS:
        return False
    groups = widths.unflatten(-1, (-1, PLANE_CHANNELS))
    return bool((groups == groups[..., :1]).all())


def plane_words(tile: int) -> int:
    """Words of a plane."""
    return tile * PLANE_BITS * PLANE_CHANNELS // WORD_BITS


def row_of(planes: int, heads: int, tile: int) -> int:
    """Words of a row that ``heads`` of them need for so many planes, a multiple of 16."""
    words = -(-planes * plane_words(tile) // heads)
    return words + -words % PLANE_CHANNELS


class PlaneStream(StreamLayout):
    """``StreamLayout`` of widths that ``fits_planes``, stored as planes that belong to one head or are shared.

    A head's slots follow one another 16 channels at a time, high bits of those first. They fill planes of its own; what is left
    over shares planes with other heads' rests, in several of them where the head with most slots reads as many in any case.

    Attributes:
        slots: int16 ``[planes, 16, 3]`` on the CPU: head, channel and shift of the two bits in each slot, in stream order. The
            shift is ``NOTHING`` where a slot holds nothing.
        aligned: whether each plane holds the same bits of 16 neighbours.
        row: as of ``StreamLayout``, a multiple of 16.
    """

    def __init__(
        self,
        widths: Tensor,
        tile: int,
        layout: Layout,
        device: torch.device | None = None,
        row: int = 0,
        levels: Levels = "gaussian",
    ) -> None:
        super().__init__(widths, tile, layout, device, row, levels)
        self.slots, self._numbers = _dealt(widths.cpu())
        self.aligned = aligned(widths)
        self.words = len(self.slots) * plane_words(tile)
        self.row = max(row, row_of(len(self.slots), self.heads, tile))
        place = torch.zeros(self.heads * self.kept, dtype=torch.long)
        place[self._order] = torch.arange(len(self.channels))
        head, channel, shift = self.slots.long().flatten(0, 1).unbind(-1)
        code = place[head * self.kept + channel]  # [planes * 16]
        self._shift = sent(shift.to(torch.int32), device)
        # numbers, where flags would be read back on the host each time; no two of them have a channel in common
        shifts = sorted(set(shift.tolist()) - {NOTHING})
        alike = [(shift == own).nonzero().flatten() for own in shifts]
        parts = [code, *alike, *(code[slots] for slots in alike)]
        self._code, *held = sent(torch.cat(parts), device).split([len(part) for part in parts])  # one copy, not nine
        self._alike = [*zip(shifts, held[: len(shifts)], held[len(shifts) :], strict=True)]

    def pack(self, codes: Tensor) -> Tensor:
        fields = (codes[..., self._code] >> self._shift) & (2**PLANE_BITS - 1)  # [B, n, tile, planes * 16]
        fields = fields.unflatten(-1, (-1, PLANE_CHANNELS)).transpose(2, 3)  # [B, n, planes, tile, 16]
        return self.cut(pack_codes(fields, PLANE_BITS, self.layout).flatten(2))

    def unpack(self, rows: Tensor) -> Tensor:
        stream = rows.transpose(1, 2).flatten(2)[..., : self.words]
        rest = (-1, PLANE_CHANNELS) if self.layout == "token" else (PLANE_CHANNELS, self.tile * PLANE_BITS // WORD_BITS)
        words = stream.unflatten(-1, (len(self.slots), -1)).unflatten(-1, rest)
        fields = unpack_codes(words, PLANE_BITS, self.layout, torch.int32)
        fields = (fields if self.layout == "token" else fields.transpose(-1, -2)).transpose(2, 3).flatten(3)
        out = torch.zeros(*stream.shape[:2], self.tile, len(self.channels), dtype=torch.int32, device=rows.device)
        for shift, slots, code in self._alike:
            out[..., code] |= fields[..., slots] << shift
        return out

    def blocks(self) -> Tensor:
        found: list[list[tuple[int, ...]]] = [[] for _ in range(self.heads)]
        flat = self.slots.flatten(0, 1).tolist()
        for head, numbers in enumerate(self._numbers):
            starts = [0, *(i for i in range(1, len(numbers)) if not _follows(flat, numbers[i - 1], numbers[i]))]
            for start, stop in itertools.pairwise([*starts, len(numbers)] if numbers else []):
                plane, column = divmod(numbers[start], PLANE_CHANNELS)
                word, channel = plane * plane_words(self.tile), flat[numbers[start]][1]
                found[head].append((word, PLANE_CHANNELS, column, stop - start, channel, PLANE_BITS))
        return sent(padded(found), self.channels.device)

    def table(self) -> tuple[Tensor, Tensor, Tensor]:
        """``planes``, ``slots`` and ``scales`` as ``PlaneLayout`` has them, for levels at even distances.

        ``P`` is the planes of the head that has most, rounded up to an even number, above 16 to a multiple of 4: kernels are
        compiled for a number, some tens of seconds each, and layers differ.
        """
        own = [sorted({number // PLANE_CHANNELS for number in numbers}) for numbers in self._numbers]
        most = max(map(len, own))
        most += -most % (2 if most <= 16 else 4)
        number = torch.tensor([[*planes, *[(planes or [0])[0]] * (most - len(planes))] for planes in own])  # [H, P]
        there = torch.arange(most) < torch.tensor([[len(planes)] for planes in own])
        head, channel, shift = self.slots.long()[number].unbind(-1)  # [H, P, 16]
        mine = (head == torch.arange(self.heads)[:, None, None]) & there[..., None] & (shift != NOTHING)
        slots = torch.stack([channel * mine, shift.where(mine, torch.tensor(-1))], -1).to(torch.int32)
        scales = (self.steps()[head, channel] * torch.exp2(shift.float())).where(mine, torch.tensor(0.0))
        device = self.channels.device
        planes = (number * plane_words(self.tile)).to(torch.int32)
        return sent(planes, device), sent(slots, device), sent(scales, device)

    def steps(self) -> Tensor:
        """Distance of the levels of each channel: float32 ``[H, kept]`` on the CPU; 0 where a channel is not stored."""
        step = torch.zeros(int(self.widths.max()) + 1)
        for width, _, _ in self.runs:
            step[width] = self.levels(width)[1] - self.levels(width)[0]
        return step[self.widths[:, : self.kept]]


def _follows(slots: list[list[int]], before: int, after: int) -> bool:
    """Whether slot number ``after`` holds the same bits of the next channel as ``before``, its neighbour in a plane."""
    (_, channel, shift), (_, next_channel, next_shift) = slots[before], slots[after]
    neighbours = after == before + 1 and after % PLANE_CHANNELS > 0
    return neighbours and next_channel == channel + 1 and next_shift == shift


@lru_cache(maxsize=8)
def _in_turn(dim: int, widest: int) -> tuple[Tensor, Tensor]:
    """Channels and shifts of the slots of a head all of whose ``dim`` channels have ``widest`` bits, in its order."""
    shifts = torch.arange(widest - PLANE_BITS, -1, -PLANE_BITS)
    order = torch.cartesian_prod(torch.arange(-(-dim // PLANE_CHANNELS)), shifts, torch.arange(PLANE_CHANNELS))
    channel = order[:, 0] * PLANE_CHANNELS + order[:, 2]
    return channel[channel < dim], order[channel < dim, 1]


def _dealt(widths: Tensor) -> tuple[Tensor, list[list[int]]]:
    """``PlaneStream.slots`` of ``widths`` ``[H, D]``, and the numbers ``plane * 16 + slot`` of each head's, in its order."""
    channel, shift = _in_turn(widths.shape[1], int(widths.max()))
    head, turn = (shift < widths[:, channel]).nonzero(as_tuple=True)  # heads one after another
    count = torch.bincount(head, minlength=len(widths)).tolist()
    full = [slots // PLANE_CHANNELS for slots in count]
    rest = [slots % PLANE_CHANNELS for slots in count]
    shared = -(-sum(rest) // PLANE_CHANNELS)
    free = [PLANE_CHANNELS] * shared
    numbers: list[list[int]] = []
    for planes in full:
        first = PLANE_CHANNELS * sum(full[: len(numbers)])
        numbers.append(list(range(first, first + PLANE_CHANNELS * planes)))
    # Who has most planes comes first, and has a rest in one piece. The others have planes to spare, up to as many as that one
    # reads: their rests fill what is left of the shared ones, least room first, before a larger one takes what remains.
    most = max(planes + (left > 0) for planes, left in zip(full, rest, strict=True))
    for one in sorted(range(len(full)), key=lambda one: (-full[one], -rest[one])):
        left, pieces = rest[one], most - full[one]
        while left:
            room = sorted((size, plane) for plane, size in enumerate(free) if size)
            whole = [(size, plane) for size, plane in room if size >= left]
            size, plane = (
                whole[0] if whole and (pieces <= 1 or whole[0] == room[0]) else room[0] if pieces > 1 else room[-1]
            )
            taken = min(left, size)
            first = PLANE_CHANNELS * (sum(full) + plane + 1) - size
            numbers[one] += range(first, first + taken)
            free[plane] -= taken
            left, pieces = left - taken, pieces - 1
    slots = torch.tensor([0, 0, NOTHING], dtype=torch.int16).repeat(PLANE_CHANNELS * (sum(full) + shared), 1)
    places = torch.tensor([*itertools.chain(*numbers)])
    slots[places] = torch.stack([head, channel[turn], shift[turn]], -1).to(torch.int16)
    return slots.unflatten(0, (-1, PLANE_CHANNELS)), numbers
