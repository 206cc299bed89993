"""Decode attention over a tier whose codes are planes of 2 bits (``PlaneLayout``), in the space of those planes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.interfaces import PlaneLayout, Quantizer
from fade_kernels_triton.device import interpreted, multiprocessors, overlaps
from fade_kernels_triton.launch import DecodeConfig
from fade_kernels_triton.operands import MAX_COLUMNS, MAX_QUERIES, TILES

PLANE_CHANNELS = 16
MAX_PLANES = 32
"""Most planes of a head and side: all of 256 channels of 4 bits."""

LAUNCH = DecodeConfig(stages=3, resident=8, overlap=True)
"""How the kernel is launched; with more than 16 query columns in more warps."""

MAX_SPLITS = 512
STEP = 128
"""Tokens a step."""

FEW_STEPS = 8
"""Steps of a program up to which launches overlap, and its first one is asked for before it is known to be there."""

BLOCK = 64
"""Channels of the output that a program of ``finish_kernel`` makes."""

MERGED = 8192
"""Elements of the parts that it holds at once."""


def unsupported_planes(layout: PlaneLayout, side: str) -> str:
    """Why the planes kernel cannot read codes of this layout; empty if it can."""
    wanted = "token" if side == "key" else "channel"
    if layout.layout != wanted:
        return f"{side}s stored {layout.layout}-major (it reads {wanted}-major {side}s)"
    if layout.tile not in TILES:
        return f"tiles of {layout.tile} tokens (it reads 64 or 128)"
    if layout.row % PLANE_CHANNELS:
        return f"rows of {layout.row} words (it reads multiples of {PLANE_CHANNELS})"
    if layout.planes.shape[1] > MAX_PLANES:
        return f"{layout.planes.shape[1]} planes a head (it reads up to {MAX_PLANES})"
    return ""


def unencodable(quantizer: Quantizer, side: str, tokens: Tensor) -> str:
    """Why ``tokens`` ``[B, H_kv, T, D]`` cannot be encoded to the planes of ``quantizer``; empty if they can."""
    layout = quantizer.planes()
    if layout is None:
        return f"quantizer {quantizer.kind!r} has a way of its own to encode"
    if reason := unsupported_planes(layout, side):
        return reason
    if tokens.shape[1] != layout.mean.shape[0] or tokens.shape[3] != layout.mean.shape[1] or tokens.shape[3] % 16:
        return f"tokens {tuple(tokens.shape)} (it takes [B, {layout.mean.shape[0]}, T, {layout.mean.shape[1]}])"
    dim = layout.mean.shape[1]
    if dim > 128 and quantizer.tile == 64:  # wrong codes on an H200 (Triton 3.6), right ones in the interpreter
        return f"tiles of 64 tokens with {dim} channels in planes (it takes 128 channels there; tiles of 128 have room)"
    return ""


def encoding_of(layout: PlaneLayout) -> tuple[Tensor, ...]:
    """What kernels that encode read of ``layout``, in the order in which they take it."""
    return (
        layout.planes,
        layout.slots,
        layout.widths,
        layout.steps,
        layout.worth,
        layout.mean,
        layout.forward,
        layout.deviation,
        layout.usual,
    )


def gains_of(layout: PlaneLayout) -> tuple[int, int, int, int]:
    """What such kernels are compiled for: the gain code worth 1, codes an octave, the first one tried, and how many are."""
    first, last = layout.gain_search
    return layout.gain_zero, layout.gain_steps, first, last - first + 1


def padded_kept(layout: PlaneLayout) -> int:
    """Channels that such kernels are compiled for."""
    return max(PLANE_CHANNELS, _next_power_of_2(layout.worth.shape[1]))


def encoding_warps(tile: int, kept: int) -> int:
    """Warps of a program that has ``kept`` channels of the tokens of a tile in registers, 64 a thread as a rule.

    No more than one for 16 tokens, which is how tensor cores deal them.
    """
    return max(4, min(tile // 16, tile * kept // 2048))


@dataclass(frozen=True)
class PlanesTier:
    """Packed tokens of one tier whose channels have widths of their own.

    Attributes:
        key_layout, value_layout: where codes are, and what they mean.
        keys, values: fields ``codes`` and ``gain``. With a table, pools ``[pool_tiles, *tile_shape]``; without,
            ``[B, H_kv, max_tiles, *tile_shape]``. Contiguous.
        count: int32 ``[B, H_kv]``, tiles in use, the same for all heads of a row; lives on the device and is read there.
        table: int32 ``[B, H_kv, max_tiles]``, pool index of each tile in use.
        valid: int32 ``[B, H_kv, max_tiles]``, leading tokens of each tile that are meant; ``None`` if all are.
    """

    key_layout: PlaneLayout
    value_layout: PlaneLayout
    keys: Mapping[str, Tensor]
    values: Mapping[str, Tensor]
    count: Tensor
    table: Tensor | None = None
    valid: Tensor | None = None

    def __post_init__(self) -> None:
        for side, layout, fields in (
            ("key", self.key_layout, self.keys),
            ("value", self.value_layout, self.values),
        ):
            if reason := unsupported_planes(layout, side):
                raise InputError(f"the Triton planes kernel cannot read {reason}")
            lead = 1 if self.table is not None else 3
            for name, dtype, length in (("codes", torch.int16, layout.row), ("gain", torch.uint8, layout.tile // 2)):
                field = fields[name]
                if field.dtype != dtype or field.dim() != lead + 1 or field.shape[-1] != length:
                    raise InputError(f"{side} field {name!r} is {field.dtype} {tuple(field.shape)}")
                if not field.is_contiguous():
                    raise InputError(f"{side} field {name!r} of shape {tuple(field.shape)} is not contiguous")
            if self.table is None and fields["codes"][0].numel() >= 2**31:
                raise InputError(f"{side} codes of one row are {fields['codes'][0].numel()} words (up to {2**31 - 1})")
        if self.key_layout.tile != self.value_layout.tile:
            raise InputError(
                f"keys in tiles of {self.key_layout.tile} tokens beside values in tiles of {self.value_layout.tile}"
            )
        for name in ("count", "table", "valid"):
            tensor = getattr(self, name)
            if tensor is not None and (tensor.dtype != torch.int32 or not tensor.is_contiguous()):
                raise InputError(f"{name} must be a contiguous int32 tensor; found {tensor.dtype}")

    @property
    def max_tiles(self) -> int:
        """Most tiles a row and head can hold."""
        return int((self.table if self.table is not None else self.keys["codes"]).shape[2])


def planes_attention(
    query: Tensor,
    tier: PlanesTier,
    scaling: float,
    other: tuple[Tensor, Tensor] | None = None,
    sinks: Tensor | None = None,
    output_dtype: torch.dtype | None = None,
    splits: int = 0,
    config: DecodeConfig = LAUNCH,
) -> tuple[Tensor, Tensor]:
    """Attention over one tier, and beside what else was attended to, in three launches.

    Nothing is read back to the host, so the call can be captured into a CUDA graph.

    Args:
        query: ``[B, H_q, Q, D]``, contiguous along the channels, ``Q`` from 1 to 8.
        tier: what is stored.
        scaling: softmax scale.
        other: output ``[B, H_q, Q, D]``, contiguous along the channels, and natural log-sum-exp ``[B, H_q, Q]`` of
            attention to other tokens, merged with the tier's.
        sinks: sink logits ``[H_q]`` that take part in the softmax and have no value.
        output_dtype: of the output; the query's by default.
        splits: programs a row and head; derived from the configuration by default.
        config: launch configuration; codes are always ``subnormal``.

    Returns:
        Output ``[B, H_q, Q, D]`` (memory order ``[B, Q, H_q, D]``) and the natural log-sum-exp of the scores, float32
        ``[B, H_q, Q]`` (-inf where nothing is stored).

    Raises:
        InputError: for shapes that the kernel cannot take; the message says which.
    """
    from fade_kernels_triton.jit.planes import planes_kernel
    from fade_kernels_triton.jit.turn import finish_kernel, turn_kernel

    keys, values = tier.key_layout, tier.value_layout
    rows, heads, q_len, dim = query.shape
    heads_kv = tier.count.shape[1]
    group, columns = heads // heads_kv, heads // heads_kv * q_len
    if dim != keys.mean.shape[1] or query.stride(3) != 1 or heads % heads_kv or tier.count.shape[0] != rows:
        raise InputError(
            f"query {tuple(query.shape)} beside keys of {keys.mean.shape[1]} channels and counts of "
            f"{tuple(tier.count.shape)} rows and KV heads"
        )
    if q_len > MAX_QUERIES or columns > MAX_COLUMNS:
        raise InputError(
            f"{q_len} query tokens, {columns} query columns a KV head (up to {MAX_QUERIES} and {MAX_COLUMNS})"
        )
    groups = rows * heads_kv
    key_planes, value_planes = keys.planes.shape[1], values.planes.shape[1]
    steps = -(-tier.max_tiles * keys.tile // STEP)
    splits = splits or max(1, min(multiprocessors(query.device) * config.resident // groups, MAX_SPLITS, steps))
    padded = max(8, _next_power_of_2(columns))
    overlap = config.overlap and overlaps(query.device) and steps <= FEW_STEPS * splits
    launch: dict[str, Any] = {"launch_pdl": True} if overlap else {}
    registers = {"maxnreg": config.registers} if config.registers and not interpreted() else {}
    made: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    turned = torch.empty(groups, columns, key_planes, PLANE_CHANNELS, dtype=torch.float16, device=query.device)
    norm, bias = torch.empty(2, groups, columns, **made)
    width = value_planes * PLANE_CHANNELS
    part, part_lse = torch.empty(groups, splits, columns, width, **made), torch.empty(groups, splits, columns, **made)
    lse = torch.empty(rows, heads, q_len, **made)
    out = torch.empty(rows, q_len, heads, dim, dtype=output_dtype or query.dtype, device=query.device).transpose(1, 2)
    turn_kernel[(key_planes, columns, groups)](
        query,
        keys.slots,
        keys.scales,
        keys.deviation,
        keys.inverse,
        keys.mean,
        keys.longest,
        turned,
        norm,
        bias,
        scaling,
        heads_kv,
        keys.deviation.shape[1],
        *query.stride()[:3],
        HEADS=group,
        D=dim,
        DP=max(64, _next_power_of_2(dim)),
        PDL=overlap,
        num_warps=1,
        **launch,
    )
    planes_kernel[(splits, groups)](
        turned,
        norm,
        tier.keys["codes"],
        tier.keys["gain"].view(torch.int32),
        keys.planes,
        keys.usual,
        tier.values["codes"],
        tier.values["gain"].view(torch.int32),
        values.planes,
        values.usual,
        tier.table,
        tier.count,
        tier.valid,
        part,
        part_lse,
        heads_kv,
        tier.max_tiles,
        splits,
        keys.row,
        values.row,
        COLUMNS=columns,
        N=padded,
        KEY_PLANES=key_planes,
        VALUE_PLANES=value_planes,
        TILE=keys.tile,
        KEY_ZERO=keys.gain_zero,
        KEY_STEPS=keys.gain_steps,
        VALUE_ZERO=values.gain_zero,
        VALUE_STEPS=values.gain_steps,
        KEY_AHEAD=_ahead(tier, keys) if overlap else 0,
        VALUE_AHEAD=_ahead(tier, values) if overlap else 0,
        STAGES=config.stages + 2 * (tier.table is not None),
        PDL=overlap,
        INTERPRET=interpreted(),
        num_warps=min(max(config.warps, padded // 16), 4),
        **launch,
        **registers,
    )
    padded_splits, padded_width = _next_power_of_2(splits), _next_power_of_2(width)
    finish_kernel[(-(-dim // BLOCK), columns, groups)](
        part,
        part_lse,
        bias,
        values.slots,
        values.scales,
        values.deviation,
        values.inverse,
        values.mean,
        None if other is None else other[0],
        None if other is None else other[1],
        sinks,
        out,
        lse,
        splits,
        heads_kv,
        values.deviation.shape[1],
        *((0, 0, 0) if other is None else other[0].stride()[:3]),
        *out.stride()[:3],
        HEADS=group,
        Q_LEN=q_len,
        PLANES=value_planes,
        WIDTH=padded_width,
        SPLITS=padded_splits,
        CHUNK=min(padded_splits, max(1, MERGED // padded_width)),
        D=dim,
        BLOCK=BLOCK,
        PDL=overlap,
        num_warps=4,
        **launch,
    )
    return out, lse


def _ahead(tier: PlanesTier, layout: PlaneLayout) -> int:
    """Bytes of its own first tiles that a program asks for before it waits; in few sizes, as each is compiled for."""
    return 0 if tier.table is not None else layout.row * 2 * (STEP // layout.tile) // 1024 * 1024


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
