"""Codes of many widths in one stream of words a tile, dealt out evenly over the heads of a layer.

A stream holds one run after another, wide channels first: the channels of width ``b``, in the order of
``StreamLayout.channels``, as planes that ``pack_codes`` packs (3 bits are planes of 2 and 1). Heads own different
numbers of channels, and a cache stores rows of one size: so the stream of all heads is cut into ``H_kv`` equal rows,
padded by at most ``H_kv - 1`` words. The heads of a tile therefore belong together: all rows are needed to read one.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fade_core.packed import WORD_BITS, Layout, pack_codes, planes_of, unpack_codes
from fade_quant_rotated.lloyd_max import LEVELS, Levels, edges_on, levels_on


def sent(tensor: Tensor, device: torch.device | None) -> Tensor:
    """A tensor of the CPU on ``device``: a GPU gets it when it is free, and the host does not wait for that."""
    if device is None or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class StreamLayout:
    """Where each channel of each head lies in the stream of one layer and side.

    Args:
        widths: int64 ``[H_kv, D]``, bits of each channel, falling along ``D``.
        tile: tokens a tile.
        layout: "token" or "channel", the word order of each plane.
        device: where tokens will be.
        row: words of a row, if they are given rather than as many as it takes.
        levels: which levels codes stand for.

    Attributes:
        widths: as given, on the CPU.
        kept: channels stored, of the head that stores most.
        channels: int64 ``[C]``, ``head * kept + channel`` of every stored channel, in stream order.
        runs: ``(width, start, stop)`` of channels of one width, in stream order.
        row: int16 words a head and tile.
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
        self.widths = widths = widths.cpu()
        self.levels = LEVELS[levels]
        self.tile, self.layout, self.heads, self.head_dim = tile, layout, *widths.shape
        self.kept = max(1, int((widths > 0).sum(-1).max()))
        runs: list[tuple[int, int, int]] = []
        order: list[Tensor] = []
        at = 0
        for width in sorted(set(widths.flatten().tolist()) - {0}, reverse=True):
            head, channel = (widths == width).nonzero(as_tuple=True)
            order.append(head * self.kept + channel)
            runs.append((width, at, at + len(head)))
            at += len(head)
        self.runs = tuple(runs)
        self._order = torch.cat(order) if order else torch.empty(0, dtype=torch.long)  # on the CPU
        self.channels = sent(self._order, device)
        self.words = int(widths.sum()) * tile // WORD_BITS
        self.row = max(row, -(-self.words // self.heads))

    @property
    def bits_per_element(self) -> float:
        """Stored bits an element of the layer, padding counted."""
        return self.row * WORD_BITS / (self.tile * self.head_dim)

    def codes(self, x: Tensor) -> Tensor:
        """Nearest levels (int32 ``[B, n, tile, C]``) of unit-variance channels ``[B, H, n, tile, kept]``."""
        flat = x.permute(0, 2, 3, 1, 4).flatten(3)[..., self.channels]
        out = torch.empty(flat.shape, dtype=torch.int32, device=x.device)
        for width, start, stop in self.runs:
            edges = edges_on(self.levels(width), x.dtype, x.device)
            out[..., start:stop] = torch.bucketize(flat[..., start:stop].contiguous(), edges, out_int32=True)
        return out

    def values(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """Levels ``[B, H, n, tile, kept]`` of codes ``[B, n, tile, C]``; 0 where a channel is not stored."""
        out = torch.zeros(*codes.shape[:3], self.heads * self.kept, dtype=dtype, device=codes.device)
        for width, start, stop in self.runs:
            out[..., self.channels[start:stop]] = levels_on(self.levels(width), dtype, codes.device)[
                codes[..., start:stop]
            ]
        result: Tensor = out.unflatten(-1, (self.heads, self.kept)).permute(0, 3, 1, 2, 4)
        return result

    def pack(self, codes: Tensor) -> Tensor:
        """Rows ``[B, H, n, row]`` (int16) of codes ``[B, n, tile, C]``."""
        parts = [torch.empty(*codes.shape[:2], 0, dtype=torch.int16, device=codes.device)]
        for width, start, stop in self.runs:
            below = width
            for plane in planes_of(width):
                below -= plane
                part = (codes[..., start:stop] >> below) & ((1 << plane) - 1)
                parts.append(pack_codes(part, plane, self.layout).flatten(-2))
        return self.cut(torch.cat(parts, -1))

    def cut(self, stream: Tensor) -> Tensor:
        """Rows ``[B, H, n, row]`` of streams ``[B, n, words]``."""
        stream = torch.nn.functional.pad(stream, (0, self.row * self.heads - self.words))
        result: Tensor = stream.unflatten(-1, (self.heads, self.row)).transpose(1, 2).contiguous()
        return result

    def unpack(self, rows: Tensor) -> Tensor:
        """Codes (int32 ``[B, n, tile, C]``) of rows ``[B, H, n, row]``."""
        stream = rows.transpose(1, 2).flatten(2)
        out = torch.zeros(*stream.shape[:2], self.tile, len(self.channels), dtype=torch.int32, device=rows.device)
        at = 0
        for width, start, stop in self.runs:
            count = stop - start
            for plane in planes_of(width):
                length = self.tile * plane // WORD_BITS
                words = stream[..., at : at + length * count]
                shape = (length, count) if self.layout == "token" else (count, length)
                part = unpack_codes(words.unflatten(-1, shape), plane, self.layout, torch.int32)
                part = part.transpose(-1, -2) if self.layout == "channel" else part
                out[..., start:stop] = (out[..., start:stop] << plane) | part
                at += length * count
        return out

    def blocks(self) -> Tensor:
        """``RunLayout.blocks``, int32 ``[H_kv, P, 6]``."""
        found: list[list[tuple[int, ...]]] = [[] for _ in range(self.heads)]
        channels, at = self._order, 0
        for width, start, stop in self.runs:
            owner, channel = channels[start:stop] // self.kept, (channels[start:stop] % self.kept).tolist()
            for plane in planes_of(width):
                for head, own in enumerate(found):
                    columns = (owner == head).nonzero().flatten().tolist()
                    for first, count in _stretches([channel[column] for column in columns]):
                        own.append((at, stop - start, columns[first], count, channel[columns[first]], plane))
                at += self.tile * plane // WORD_BITS * (stop - start)
        return sent(padded(found), self.channels.device)

    def select(self, rows: Tensor, index: Tensor) -> Tensor:
        """Rows of the tokens ``index`` (int64 ``[B, H, K]``) of each head, codes untouched."""
        codes = self.unpack(rows).flatten(1, 2)
        own = index[:, self.channels // self.kept].transpose(1, 2)
        return self.pack(codes.gather(1, own).unflatten(1, (-1, self.tile)))


def padded(blocks: list[list[tuple[int, ...]]]) -> Tensor:
    """Blocks of each head as ``RunLayout`` has them: those with fewer than the most get some without a column."""
    most = max(1, *map(len, blocks))
    return torch.tensor([[*own, *[(0,) * 6] * (most - len(own))] for own in blocks], dtype=torch.int32)


def _stretches(numbers: list[int]) -> list[tuple[int, int]]:
    """Where each stretch of ``numbers`` that follow one another begins, and how long it is."""
    starts = [n for n, number in enumerate(numbers) if not n or number != numbers[n - 1] + 1]
    return [(start, stop - start) for start, stop in itertools.pairwise([*starts, len(numbers)])]
