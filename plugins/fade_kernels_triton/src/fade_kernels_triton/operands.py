"""What a decode step attends to: packed tiers and a full-precision window, as the kernels want them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.packed import PackedFormat, planes_of

HEAD_DIMS = (64, 80, 96, 128, 256)
PACKED_BITS = (2, 3, 4)
WIDTHS = ((2, 2), (3, 2), (4, 2), (4, 4))
"""Bits of keys and of values that go together: a matrix operand of either holds the same tokens."""

GROUPS = (1, 2, 4)
GROUPS_TAKEN = f"one group, or {GROUPS[1]} or {GROUPS[2]} along channels that fill a power of two"
TILES = (64, 128)
TOKEN_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What tokens come in and go out as; queries are 16-bit."""

MAX_COLUMNS = 128
"""Query heads of a KV head times query tokens."""

MAX_QUERIES = 8
MAX_TIERS = 2


def unsupported_format(fmt: PackedFormat | None, side: str) -> str:
    """Why the decode kernel cannot read this format; empty if it can."""
    if fmt is None:
        return f"the {side} quantizer has no packed format"
    if fmt.bits not in PACKED_BITS:
        return f"{fmt.bits}-bit {side}s (it reads {', '.join(map(str, PACKED_BITS))} bits)"
    if fmt.levels is not None:
        return f"{side}s with a level table (it reads uniform codes)"
    if side == "key" and fmt.groups != 1:
        return f"{fmt.groups} groups along the keys' axis (it reads one group)"
    if reason := odd_groups(fmt):
        return f"{side}s in {reason} (it reads {GROUPS_TAKEN})"
    if fmt.tile not in TILES:
        return f"tiles of {fmt.tile} tokens (it reads 64 or 128)"
    if side == "key" and fmt.layout != "token":
        return "keys stored channel-major (it reads token-major keys)"
    if side == "value" and fmt.layout != "channel":
        return "values stored token-major (it reads channel-major values)"
    if side == "value" and fmt.axis != "token":
        return "values with per-channel scales (it reads per-token value scales)"
    if fmt.head_dim not in HEAD_DIMS:
        return f"head_dim {fmt.head_dim} (it reads {', '.join(map(str, HEAD_DIMS))})"
    return ""


def odd_groups(fmt: PackedFormat) -> str:
    """How many groups of a scale a tile has, if the kernels do not take that; empty if they do."""
    even = fmt.axis == "token" and not fmt.head_dim & (fmt.head_dim - 1)
    return "" if fmt.groups in (GROUPS if even else GROUPS[:1]) else f"{fmt.groups} groups along the axis"


def planes(fields: Mapping[str, Tensor], fmt: PackedFormat) -> tuple[Tensor, Tensor | None]:
    """Code words of a side, and those of its second plane, if it has one."""
    first, *rest = planes_of(fmt.bits)
    return fields[f"codes{first}"], fields[f"codes{rest[0]}"] if rest else None


def unsupported_pair(keys: PackedFormat | None, values: PackedFormat | None, head_dim: int) -> str:
    """Why the decode kernel cannot read a tier of these two formats; empty if it can."""
    if reason := unsupported_format(keys, "key") or unsupported_format(values, "value"):
        return reason
    if keys is None or values is None:
        return "no packed format"
    if (keys.bits, values.bits) not in WIDTHS or keys.tile != values.tile:
        return (
            f"keys of {keys.bits} bits in tiles of {keys.tile} beside values of {values.bits} bits in tiles of "
            f"{values.tile} (it reads one tile a tier, and bits of {', '.join(f'{k} and {v}' for k, v in WIDTHS)})"
        )
    if (keys.head_dim, values.head_dim) != (head_dim, head_dim):
        return f"codes of {keys.head_dim} and {values.head_dim} channels beside a query of {head_dim}"
    return ""


@dataclass(frozen=True)
class PackedTier:
    """Packed tokens of one tier.

    Attributes:
        key_format, value_format: layouts of the fields; one tile for both sides, and widths of ``WIDTHS``.
        keys, values: fields ``codes<bits>`` (int16; of 3 bits ``codes2`` and ``codes1``) and ``meta`` (int32). With a table,
            pools ``[pool_tiles, *tile_shape]``; without, ``[B, H_kv, max_tiles, *tile_shape]``. Contiguous.
        count: int32 ``[B, H_kv]``, tiles in use; lives on the device and is read there.
        table: int32 ``[B, H_kv, max_tiles]``, pool index of each tile in use.
        valid: int32 ``[B, H_kv, max_tiles]``, leading tokens of each tile that are meant; ``None`` if all are.
        positions: int32, the pool's shape up to the tile, times ``tile``: position of each token, negative for none.
    """

    key_format: PackedFormat
    value_format: PackedFormat
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    count: Tensor
    table: Tensor | None = None
    valid: Tensor | None = None
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        if reason := unsupported_pair(self.key_format, self.value_format, self.key_format.head_dim):
            raise InputError(f"the Triton decode kernel cannot read {reason}")
        lead, outer = (1, "pool_tiles") if self.table is not None else (3, "B, H_kv, max_tiles")
        for side, fmt, fields in (
            ("key", self.key_format, self.keys),
            ("value", self.value_format, self.values),
        ):
            for name, (shape, dtype) in fmt.field_shapes().items():
                if name not in fields:
                    raise InputError(f"{side} field {name!r} is missing; found {sorted(fields)}")
                field = fields[name]
                if field.dim() != lead + len(shape) or tuple(field.shape[lead:]) != shape or field.dtype != dtype:
                    raise InputError(
                        f"{side} field {name!r} is {field.dtype} {tuple(field.shape)}; {dtype} "
                        f"[{outer}, {', '.join(map(str, shape))}] is read"
                    )
                if not field.is_contiguous():
                    raise InputError(f"{side} field {name!r} of shape {tuple(field.shape)} is not contiguous")
        for name in ("count", "table", "valid", "positions"):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.dtype != torch.int32 or not tensor.is_contiguous()):
                raise InputError(f"{name} must be a contiguous int32 tensor; found {tensor.dtype}")

    @property
    def max_tiles(self) -> int:
        """Most tiles a row and head can hold."""
        source = self.table if self.table is not None else self.keys["meta"]
        return int(source.shape[2])

    @property
    def tiles_per_step(self) -> int:
        """Tiles that make a full 16-row matrix operand."""
        rows = self.value_format.tile * self.value_format.bits // 16
        return max(1, 16 // rows)


@dataclass(frozen=True)
class Window:
    """Full-precision tokens: sinks, then the recent window, the queries' own tokens last.

    Attributes:
        keys, values: ``[B, H_kv, capacity, D]`` in the query's dtype, channels contiguous.
        length: int32 ``[B]`` or ``[B, H_kv]``, tokens held; lives on the device.
        positions: int32 ``[B, capacity]`` or ``[B, H_kv, capacity]``; negative for none. ``None``: in order.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    positions: Tensor | None = None

    def __post_init__(self) -> None:
        if self.keys.dim() != 4 or self.keys.shape != self.values.shape:
            raise InputError(
                f"window keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} must both be "
                f"[B, H_kv, capacity, D]"
            )
        if self.keys.stride(3) != 1 or self.values.stride(3) != 1:
            raise InputError("window keys and values must be contiguous along their channels")
        if self.length.dtype != torch.int32:
            raise InputError(f"window lengths must be int32; found {self.length.dtype}")
        if self.positions is not None and (self.positions.dtype != torch.int32 or self.positions.stride(-1) != 1):
            raise InputError("window positions must be int32 and contiguous along the tokens")
