"""How codes lie in memory, for kernels that read them in place."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fade_core.packed import Layout


@dataclass(frozen=True)
class PlainEncoding:
    """What ``encode`` does, for kernels: nearest codes on a uniform grid of ``format`` over each group of ``x @ rotation``.

    Attributes:
        rotation: float32 ``[D, D]`` on the tokens' device, kept alive and unchanged by the quantizer; ``None`` for none.
        outward: whether a minimum is rounded down to fp16 and a step up, so that the grid spans its group; both are
            rounded to nearest otherwise.
        decodes: whether ``decode`` is the way back and nothing else: ``code * scale + minimum``, times the transposed rotation.
    """

    rotation: Tensor | None = None
    outward: bool = True
    decodes: bool = False


@dataclass(frozen=True, eq=False)
class PlaneLayout:
    """Codes at even distances about a mean, as planes of 2 bits, for kernels.

    A plane has 16 slots; each holds two bits of some transformed channel of some head, for all tokens of a tile:
    ``R = tile / 8`` word rows, field ``j`` of word row ``r`` is token ``j * R + r``, as in a ``PackedFormat`` of 2 bits. A
    channel of ``2 * n`` bits has ``n`` slots, in any planes. The planes of all heads of a row are one stream of words a tile:
    word ``w`` of it is word ``w % row`` of field ``codes`` (int16 ``[row]``) of the tile that head ``w // row`` has
    (``Quantizer.heads_together``).
    In byte ``i`` of field ``gain`` (uint8 ``[tile // 2]``) token ``i`` has the low half, token ``i + tile // 2`` the high one.

    Channel ``c`` of a token is ``y[c] = gain * sum((field - 1.5) * scale)`` over the slots that hold the channel, with
    ``gain = 2 ** ((gain_code - gain_zero) / gain_steps + usual)``, and the token is ``mean + (y * deviation) @ inverse``.

    The way there: ``y = (token - mean) @ forward / deviation``. The gain code nearest to the root mean square of the stored
    channels of ``y``, and those ``gain_search`` away from it, are tried for the least squared error weighted by ``worth``.

    All tensors are on the tokens' device, contiguous.

    Attributes:
        tile: tokens a tile.
        row: words of the stream that a head's tile holds, a multiple of 16.
        layout: "token" for planes ``[R, 16]`` (keys), "channel" for ``[16, R]`` (values).
        planes: int32 ``[H_kv, P]``: where each plane that holds channels of a head begins in the stream, a multiple of 16. A
            head with fewer than ``P`` has its first one, or another's, again.
        slots: int32 ``[H_kv, P, 16, 2]``: the channel of each slot of those, and how far its bits are shifted in the channel's
            code; 0 and -1 where the slot is another head's, or holds nothing, or its plane is there a second time.
        scales: float32 ``[H_kv, P, 16]``, what one step of a slot's fields is worth: ``steps[channel] * 2 ** shift``, or 0.
        widths: int32 ``[H_kv, kept]``, bits of each channel.
        steps: float32 ``[H_kv, kept]``, distance of the levels of each channel; 0 where it is not stored.
        usual: float32 ``[H_kv]``, base-2 logarithm of the gain of code ``gain_zero``.
        gain_zero: as above.
        gain_steps: gain codes an octave.
        gain_search: the first and the last gain code that are tried, from the nearest one.
        mean: float32 ``[H_kv, D]``.
        deviation: float32 ``[H_kv, kept]``.
        worth: float32 ``[H_kv, kept]``; 0 where a channel is not stored.
        forward: float16 ``[H_kv, D, kept]``.
        inverse: float16 ``[H_kv, kept, D]``.
        longest: float32 ``[H_kv]``: length of the longest vector ``scale * deviation * inverse`` of any slot, so that a
            kernel knows how large a query's products with the stored channels can be.
    """

    tile: int
    row: int
    layout: Layout
    planes: Tensor
    slots: Tensor
    scales: Tensor
    widths: Tensor
    steps: Tensor
    usual: Tensor
    gain_zero: int
    gain_steps: int
    gain_search: tuple[int, int]
    mean: Tensor
    deviation: Tensor
    worth: Tensor
    forward: Tensor
    inverse: Tensor
    longest: Tensor


@dataclass(frozen=True, eq=False)
class RunLayout:
    """Codes of channels whose widths differ, from 0 to 8 bits, in runs, for kernels that look levels up.

    The codes of all heads of a row are one stream of words a tile: word ``w`` of it is word ``w % row`` of field ``codes``
    (int16 ``[row]``) of the tile that head ``w // row`` has (``Quantizer.heads_together``). The stream is made of blocks, each
    one bit plane of a run of channels, with ``R = tile * bits / 16`` words a channel: field ``j`` of word ``r`` is token
    ``j * R + r``. Field ``gain`` is that of ``PlaneLayout``.

    Channel ``c`` of a token in the space of the codes is ``gains[head, gain_code] * levels[2 ** width + code]``, and 0 where
    the width is 0. ``Quantizer.transform_query``, ``query_bias`` and ``transform_output`` say how that space is reached.

    All tensors are on the tokens' device, contiguous.

    Attributes:
        tile: tokens a tile.
        row: words of the stream that a head's tile holds.
        layout: "token" for blocks ``[R, columns]`` (keys), "channel" for ``[columns, R]`` (values).
        blocks: int32 ``[H_kv, P, 6]``: of each bit plane of a head's channels, high bits of a channel before its low ones, the
            word of the stream where its block begins, the block's columns, the first of them that is the head's, how many are,
            the head's first channel among them, and the bits. None are the head's where a head has fewer than ``P``.
        widths: int32 ``[H_kv, kept]``, bits of each channel.
        levels: float32 ``[512]``: those of width ``b`` begin at ``2 ** b``.
        gains: float32 ``[H_kv, 16]``.
    """

    tile: int
    row: int
    layout: Layout
    blocks: Tensor
    widths: Tensor
    levels: Tensor
    gains: Tensor
