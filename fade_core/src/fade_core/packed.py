"""The packed token format: the contract between quantizers and kernels (picture: docs/formats.md).

A *tile* is ``tile`` consecutive tokens of one row and KV head. Its codes are bit-packed into int16 words along the
token axis: a plane of width ``w`` bits has ``R = tile * w // 16`` word rows, and field ``j`` of word row ``r`` holds
token ``j * R + r``. A bit-width that does not divide 16 is the sum of planes that do: 3 bits are a plane of 2 (the
high bits) and a plane of 1. Token-major tiles (keys) store words ``[R, D]``, channel-major tiles (values) ``[D, R]``.

Metadata is one int32 word a group: the fp16 *scale* in the low half, the fp16 *minimum* in the high half, so that
``x = code * scale + minimum`` (or ``levels[code] * scale + minimum``). Groups run along the channels of one token
(``axis="token"``, words ``[D // group, tile]``) or along the tokens of one channel (``axis="channel"``, words
``[tile // group, D]``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fade_core.errors import ConfigError

FORMAT_VERSION = 1
"""Written into checkpoints; raised when the meaning of a packed word changes."""

Axis = Literal["token", "channel"]
Layout = Literal["token", "channel"]

WORD_BITS = 16
_PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def planes_of(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes that hold a code of ``bits`` bits, high bits first.

    Raises:
        ConfigError: if codes of that width cannot be packed.
    """
    if bits not in _PLANES:
        raise ConfigError(f"bits={bits!r} cannot be packed; choose one of {sorted(_PLANES)}")
    return _PLANES[bits]


@dataclass(frozen=True)
class PackedFormat:
    """How the codes and metadata of one tile are laid out in memory.

    Attributes:
        bits: width of a code.
        head_dim: channels ``D`` of a token.
        tile: tokens in a tile, a multiple of 16.
        axis: what shares a scale: the channels of a token, or the tokens of a channel.
        group: elements that share a scale; 0 means the whole axis (``head_dim`` or ``tile``).
        layout: "token" for word rows ``[R, D]`` (keys), "channel" for ``[D, R]`` (values).
        levels: reconstruction level of each code; ``None`` means the code itself (a uniform grid).
    """

    bits: int
    head_dim: int
    tile: int = 64
    axis: Axis = "token"
    group: int = 0
    layout: Layout = "token"
    levels: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        planes_of(self.bits)
        if self.head_dim <= 0:
            raise ConfigError(f"head_dim={self.head_dim} must be positive")
        if self.tile <= 0 or self.tile % WORD_BITS:
            raise ConfigError(f"tile={self.tile} must be a positive multiple of {WORD_BITS}")
        if self.axis not in ("token", "channel"):
            raise ConfigError(f"axis={self.axis!r} must be 'token' or 'channel'")
        if self.layout not in ("token", "channel"):
            raise ConfigError(f"layout={self.layout!r} must be 'token' or 'channel'")
        whole = self.head_dim if self.axis == "token" else self.tile
        if self.group < 0 or (self.group and whole % self.group):
            raise ConfigError(f"group={self.group} must divide {whole} (axis {self.axis!r})")
        if not self.group:
            object.__setattr__(self, "group", whole)
        if self.levels is not None and len(self.levels) != 2**self.bits:
            raise ConfigError(f"{len(self.levels)} levels given for {self.bits}-bit codes; {2**self.bits} are needed")

    @property
    def groups(self) -> int:
        """Groups along the grouped axis of one tile."""
        return (self.head_dim if self.axis == "token" else self.tile) // self.group

    @property
    def bits_per_element(self) -> float:
        """Bits an element, metadata counted."""
        return self.bits + 32 / self.group

    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape (of one tile) and dtype of every stored field."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for width in planes_of(self.bits):
            rows = self.tile * width // WORD_BITS
            shape = (rows, self.head_dim) if self.layout == "token" else (self.head_dim, rows)
            shapes[f"codes{width}"] = (shape, torch.int16)
        meta = (self.groups, self.tile) if self.axis == "token" else (self.groups, self.head_dim)
        shapes["meta"] = (meta, torch.int32)
        return shapes


@dataclass(frozen=True)
class Packed:
    """Encoded tokens: every field is ``[B, H_kv, n_tiles, ...]``; ``length`` tokens of them are meant.

    Attributes:
        fields: name to tensor; what they mean is the quantizer's business.
        length: tokens ``T``; the last tile may be partly filled.
        dtype: dtype that ``decode`` gives back.
    """

    fields: dict[str, Tensor]
    length: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all fields."""
        return sum(field.numel() * field.element_size() for field in self.fields.values())

    def split(self, tile: int, tiles: int) -> list[Packed]:
        """Parts of at most ``tiles`` tiles of ``tile`` tokens each, in order; views."""
        step = tile * tiles
        return [
            Packed(
                {name: field[:, :, start // tile : start // tile + tiles] for name, field in self.fields.items()},
                min(step, self.length - start),
                self.dtype,
            )
            for start in range(0, self.length, step)
        ]


@dataclass(frozen=True)
class Tiles:
    """Places for tiles in a pool.

    Attributes:
        fields: the pool by the quantizer's names, ``[N, *tile_shape]`` each.
        ids: int32 or int64 ``[B, H_kv, n]``: pool tile of each tile; a negative one has no place and is not written. No two
            are alike.
    """

    fields: Mapping[str, Tensor]
    ids: Tensor


def pack_codes(codes: Tensor, width: int, layout: Layout) -> Tensor:
    """Pack codes ``[..., tile, D]`` (integers below ``2 ** width``) into int16 words ``[..., R, D]`` or ``[..., D, R]``."""
    tile, dim = codes.shape[-2:]
    fields = WORD_BITS // width
    rows = tile // fields
    planes = codes.reshape(*codes.shape[:-2], fields, rows, dim).to(torch.int32)
    words = planes[..., 0, :, :].clone()
    for j in range(1, fields):
        words |= planes[..., j, :, :] << (width * j)
    if layout == "channel":
        words = words.transpose(-1, -2)
    return words.to(torch.int16).contiguous()  # the conversion wraps: the bit pattern is what counts


def unpack_codes(words: Tensor, width: int, layout: Layout, dtype: torch.dtype = torch.int16) -> Tensor:
    """Undo ``pack_codes``: words to codes ``[..., tile, D]`` (token-major) or ``[..., D, tile]`` (channel-major)."""
    # words that are shifted together: the rows of a tile are short on a CPU
    lanes = 4 if words.shape[-1] % 4 == 0 and words.storage_offset() % 4 == 0 else 1
    if lanes > 1:
        words = words.flatten().view(torch.int64).view(*words.shape[:-1], words.shape[-1] // lanes)
    shifts = torch.arange(0, WORD_BITS, width, dtype=words.dtype, device=words.device)
    mask = sum(((1 << width) - 1) << (WORD_BITS * lane) for lane in range(lanes))
    if layout == "token":
        codes = (words[..., None, :, :] >> shifts[:, None, None]).bitwise_and_(mask)  # [..., fields, R, D / lanes]
        return codes.view(torch.int16).flatten(-3, -2).to(dtype)
    codes = (words[..., None, :] >> shifts[:, None]).bitwise_and_(mask)  # [..., D, fields, R / lanes]
    return codes.view(torch.int16).flatten(-2).to(dtype)


def pack_meta(scale: Tensor, minimum: Tensor) -> Tensor:
    """Two fp16 tensors of one shape into int32 words: scale low, minimum high."""
    pair = torch.stack([scale, minimum], dim=-1).to(torch.float16).contiguous()
    return pair.view(torch.int32).squeeze(-1)


def unpack_meta(meta: Tensor) -> tuple[Tensor, Tensor]:
    """Undo ``pack_meta``: fp16 views ``(scale, minimum)`` of the words' shape."""
    pair = meta.contiguous().view(torch.float16).unflatten(-1, (meta.shape[-1], 2))
    return pair[..., 0], pair[..., 1]
