"""A stream that kernels read: planes of 2 bits of 16 channels each, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from fade_core.packed import WORD_BITS, Layout, pack_codes, unpack_codes
from fade_quant_rotated.lloyd_max import Levels
from fade_quant_rotated.streams import StreamLayout, padded, sent

PLANE_BITS = 2
PLANE_CHANNELS = 16
"""Channels of a plane, and words whose rows kernels read at once."""


def fits_planes(widths: Tensor) -> bool:
    """Whether ``widths`` ``[H_kv, D]`` are even, and alike over each 16 channels; some are not 0."""
    if widths.shape[-1] % PLANE_CHANNELS or not bool(widths.any()):
        return False
    groups = widths.unflatten(-1, (-1, PLANE_CHANNELS))
    return bool((groups % PLANE_BITS == 0).all()) and bool((groups == groups[..., :1]).all())


class PlaneStream(StreamLayout):
    """``StreamLayout`` of widths that ``fits_planes``: stored by head, then by 16 channels, then by two bits, high ones first.

    Attributes:
        planes: int64 ``[planes, 3]`` on the CPU in stream order: head, first channel, and the shift of its two bits.
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
        self.row += -self.row % PLANE_CHANNELS
        groups = widths.cpu()[:, ::PLANE_CHANNELS].tolist()
        self.planes = torch.tensor(
            [
                (head, number * PLANE_CHANNELS, shift)
                for head, own in enumerate(groups)
                for number, width in enumerate(own)
                for shift in range(width - PLANE_BITS, -1, -PLANE_BITS)
            ]
        )
        place = torch.zeros(self.heads * self.kept, dtype=torch.long)
        place[self._order] = torch.arange(len(self.channels))
        first = self.planes[:, 0] * self.kept + self.planes[:, 1]
        channel = first[:, None] + torch.arange(PLANE_CHANNELS)
        self._place = sent(place[channel], device)  # [planes, 16], among the codes
        self._shift = sent(self.planes[:, 2:].to(torch.int32), device)
        shifts = self.planes[:, 2]
        # numbers, where flags would be read back on the host each time
        self._alike = [sent((shifts == shift).nonzero().flatten(), device) for shift in shifts.unique().tolist()]

    @property
    def plane_words(self) -> int:
        """Words of a plane."""
        return self.tile * PLANE_BITS * PLANE_CHANNELS // WORD_BITS

    def pack(self, codes: Tensor) -> Tensor:
        fields = (codes[..., self._place] >> self._shift) & (2**PLANE_BITS - 1)  # [B, n, tile, planes, 16]
        return self.cut(pack_codes(fields.transpose(2, 3), PLANE_BITS, self.layout).flatten(2))

    def unpack(self, rows: Tensor) -> Tensor:
        stream = rows.transpose(1, 2).flatten(2)[..., : self.words]
        rest = (-1, PLANE_CHANNELS) if self.layout == "token" else (PLANE_CHANNELS, self.tile * PLANE_BITS // WORD_BITS)
        words = stream.unflatten(-1, (len(self.planes), -1)).unflatten(-1, rest)
        fields = unpack_codes(words, PLANE_BITS, self.layout, torch.int32)
        fields = (fields if self.layout == "token" else fields.transpose(-1, -2)).transpose(2, 3) << self._shift
        out = torch.zeros(*stream.shape[:2], self.tile, len(self.channels), dtype=torch.int32, device=rows.device)
        for planes in self._alike:  # no two of them have a channel in common
            out[..., self._place[planes].flatten()] |= fields[..., planes, :].flatten(3)
        return out

    def blocks(self) -> Tensor:
        found: list[list[tuple[int, ...]]] = [[] for _ in range(self.heads)]
        for number, (head, channel, _) in enumerate(self.planes.tolist()):
            found[head].append((number * self.plane_words, PLANE_CHANNELS, 0, PLANE_CHANNELS, channel, PLANE_BITS))
        return sent(padded(found), self.channels.device)

    def table(self) -> tuple[Tensor, Tensor]:
        """``planes`` and ``scales`` as ``PlaneLayout`` has them, for levels at even distances.

        ``P`` is the planes of the head that has most, rounded up: to an even number, above 8 to a multiple of 4. Kernels are
        compiled for a number, some tens of seconds each, and layers differ. What a head lacks is its first plane again, or
        another's, worth 0.
        """
        head, channel, shift = self.planes.unbind(1)
        width = self.widths[head, channel]
        word = torch.arange(len(self.planes)) * self.plane_words
        step = torch.zeros(int(width.max()) + 1)
        for own, _, _ in self.runs:
            step[own] = self.levels(own)[1] - self.levels(own)[0]
        counts = head.bincount(minlength=self.heads)
        first = counts.cumsum(0) - counts
        most = int(counts.max())
        place = torch.arange(most + -most % (2 if most <= 8 else 4))
        there = place < counts[:, None]
        number = torch.where(there, first[:, None] + place, (first * (counts > 0))[:, None])  # [H, P]
        planes = torch.stack([word, channel, shift, width], 1).to(torch.int32)[number]
        scales = (step[width] * torch.exp2(shift.float()))[number] * there
        return sent(planes, self.channels.device).contiguous(), sent(scales, self.channels.device)
