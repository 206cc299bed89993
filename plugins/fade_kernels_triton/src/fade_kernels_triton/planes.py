"""Decode attention over a tier whose channels have widths of their own (``PlaneLayout``), in the space of its codes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.interfaces import PlaneLayout
from fade_kernels_triton.device import interpreted, multiprocessors
from fade_kernels_triton.merge import merge
from fade_kernels_triton.operands import MAX_COLUMNS, MAX_QUERIES, TILES

WIDTHS = (4, 2)
"""Widths that are read, the first stored first."""

GROUP = 16
"""Channels that share a width."""

MAX_KEPT = 256
RESIDENT = 8
"""Programs a multiprocessor that the number of splits aims at."""

MAX_SPLITS = 512
STEP = 128
"""Tokens a step."""

STAGES = 3


_refusals: WeakKeyDictionary[PlaneLayout, dict[str, str]] = WeakKeyDictionary()


def unsupported_planes(layout: PlaneLayout, side: str) -> str:
    """Why the planes kernel cannot read codes of this layout; empty if it can. Looked at once a layout."""
    known = _refusals.setdefault(layout, {})
    if side not in known:
        known[side] = _refusal(layout, side)
    return known[side]


def _refusal(layout: PlaneLayout, side: str) -> str:
    wanted = "token" if side == "key" else "channel"
    if unknown := sorted(set(layout.levels) - set(WIDTHS)):
        return f"{side}s of {', '.join(map(str, unknown))} bits beside others (it reads planes of 4 and of 2)"
    if layout.group != GROUP:
        return f"{side}s whose channels share a width by {layout.group} (it reads groups of {GROUP}: group = {GROUP})"
    if layout.layout != wanted:
        return f"{side}s stored {layout.layout}-major (it reads {wanted}-major {side}s)"
    if layout.tile not in TILES:
        return f"tiles of {layout.tile} tokens (it reads 64 or 128)"
    if layout.kept > MAX_KEPT:
        return f"{layout.kept} stored channels (it reads up to {MAX_KEPT})"
    widths = layout.channels[..., 0]
    if bool((widths.diff(dim=1) > 0).any()):
        return f"{side}s whose widths rise along the channels (it reads falling ones)"
    half = torch.tensor(layout.levels.get(4, ())).half()
    if not torch.equal(half, -half.flip(0)) or bool((half[len(half) // 2 :] <= 0).any()):
        return f"{side}s of 4 bits whose levels are not symmetric about 0"
    return ""


@dataclass(frozen=True)
class PlanesTier:
    """Packed tokens of one tier whose channels have widths of their own.

    Attributes:
        key_layout, value_layout: where codes are.
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


@dataclass(frozen=True)
class Reading:
    """What the kernel is told of one side's codes.

    Attributes:
        places: int32 ``[H_kv, 4]`` on the tokens' device: first word and number of groups of 4 bits, then of 2 bits.
        steps: words between word rows of 4 and of 2 bits.
        groups: most groups of 4 and of 2 bits that a head has; from 3 on even numbers, so that fewer kernels are compiled.
        table: levels as bytes in six words: low ones of levels 8 to 11 and 12 to 15 of the 4-bit codes, their high ones,
            then low and high ones of the four 2-bit levels.
        spacing: distances between neighbouring levels of the 4-bit and of the 2-bit codes; zeros if not even and about 0.
        aligned: whether no word row of a group, and no channel's words, are cut between two heads' rows.
    """

    places: Tensor
    steps: tuple[int, int]
    groups: tuple[int, int]
    table: tuple[int, ...]
    spacing: tuple[float, float]
    aligned: bool


_readings: WeakKeyDictionary[PlaneLayout, Reading] = WeakKeyDictionary()


def reading_of(layout: PlaneLayout) -> Reading:
    """What the kernel is told of ``layout``; made once a layout, which copies a few numbers to the device."""
    if layout not in _readings:
        groups = layout.channels[:, ::GROUP]
        places, steps, most = [], [], []
        for width in WIDTHS:
            there = groups[..., 0] == width
            counts = there.sum(1)
            first = groups[..., 1].masked_fill(~there, torch.iinfo(torch.int32).max).amin(1)
            places += [first.masked_fill(counts == 0, 0), counts]
            steps.append(int(groups[..., 2][there].max()) if bool(there.any()) else 0)
            number = int(counts.max())
            most.append(number if number <= 2 else number + number % 2)
        _readings[layout] = Reading(
            torch.stack(places, 1).to(torch.int32).contiguous().to(layout.usual.device),
            (steps[0], steps[1]),
            (most[0], most[1]),
            _table(layout.levels.get(4, ()), layout.levels.get(2, ())),
            _spacing(layout.levels.get(4, ()), layout.levels.get(2, ())),
            layout.row % GROUP == 0,
        )
    return _readings[layout]


@cache
def _table(four: tuple[float, ...], two: tuple[float, ...]) -> tuple[int, ...]:
    """``Reading.table`` of the levels of 4 and of 2 bits."""
    words: list[int] = []
    for levels in (four[8:] or (0.0,) * 8, two or (0.0,) * 4):
        numbers = torch.tensor(levels).half().view(torch.int16).view(-1, 4).long()
        for part in (numbers & 0xFF, (numbers >> 8) & 0xFF):
            words += (part << torch.arange(0, 32, 8)).sum(1).to(torch.int32).tolist()  # wraps: the bits are what counts
    return tuple(words)


def _spacing(four: tuple[float, ...], two: tuple[float, ...]) -> tuple[float, float]:
    """``Reading.spacing`` of the levels of 4 and of 2 bits; 1 for codes that there are none of."""
    found = []
    for levels in (four, two):
        if not levels:
            found.append(1.0)
            continue
        steps = [after - before for before, after in itertools.pairwise(levels)]
        if max(steps) - min(steps) + abs(levels[0] + levels[-1]) > 1e-6 * max(steps):
            return 0.0, 0.0
        found.append(sum(steps) / len(steps))
    return found[0], found[1]


def planes_attention(query: Tensor, tier: PlanesTier, splits: int = 0) -> tuple[Tensor, Tensor]:
    """Attention of transformed query tokens over one tier, in one launch and one merge.

    Nothing is read back to the host, so the call can be captured into a CUDA graph.

    Args:
        query: ``[B, H_q, Q, kept]`` as ``transform_query`` gives it, scaled; contiguous along the channels, ``Q`` 1 to 8.
        tier: what is stored.
        splits: programs a row and head; derived from the device by default.

    Returns:
        Output ``[B, H_q, Q, kept]`` in the space of the values' codes, float32, and the natural log-sum-exp of the scores
        ``[B, H_q, Q]`` (-inf where nothing is stored).

    Raises:
        InputError: for shapes that the kernel cannot take; the message says which.
    """
    from fade_kernels_triton.jit.planes import planes_kernel

    keys, values = tier.key_layout, tier.value_layout
    rows, heads, q_len, kept = query.shape
    heads_kv = tier.count.shape[1]
    group, columns = heads // heads_kv, heads // heads_kv * q_len
    if kept != keys.kept or query.stride(3) != 1 or heads % heads_kv or tier.count.shape[0] != rows:
        raise InputError(
            f"query {tuple(query.shape)} beside {keys.kept} stored channels of {tuple(tier.count.shape)} rows and KV heads"
        )
    if q_len > MAX_QUERIES or columns > MAX_COLUMNS:
        raise InputError(
            f"{q_len} query tokens, {columns} query columns a KV head (up to {MAX_QUERIES} and {MAX_COLUMNS})"
        )
    groups = rows * heads_kv
    slots = multiprocessors(query.device) * RESIDENT
    steps = -(-tier.max_tiles * keys.tile // STEP)
    splits = splits or max(1, min(slots // groups, MAX_SPLITS, steps))
    padded = max(8, _next_power_of_2(columns))
    out = torch.empty(rows, q_len, heads, values.kept, dtype=torch.float32, device=query.device).transpose(1, 2)
    lse = torch.empty(rows, heads, q_len, dtype=torch.float32, device=query.device)
    part = torch.empty(groups, splits, columns, values.kept, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(groups, splits, columns, dtype=torch.float32, device=query.device)
    options: dict[str, Any] = {"num_warps": min(max(1, padded // 16), 4)}
    planes_kernel[(splits, groups)](
        query,
        tier.keys["codes"],
        tier.keys["gain"].view(torch.int32),
        reading_of(keys).places,
        keys.usual,
        tier.values["codes"],
        tier.values["gain"].view(torch.int32),
        reading_of(values).places,
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
        *reading_of(keys).steps,
        values.kept,
        *query.stride()[:3],
        HEADS=group,
        Q_LEN=q_len,
        N=padded,
        **constants(keys, values),
        STAGES=STAGES + 2 * (tier.table is not None),
        INTERPRET=interpreted(),
        **options,
    )
    merge(part, part_lse, None, out, lse)
    return out, lse


def constants(keys: PlaneLayout, values: PlaneLayout) -> dict[str, Any]:
    """What the kernel is compiled for, of two layouts."""
    found: dict[str, Any] = {"TILE": keys.tile}
    for name, layout in (("KEY", keys), ("VALUE", values)):
        read = reading_of(layout)
        found |= {
            f"{name}4": read.groups[0],
            f"{name}2": read.groups[1],
            f"{name}_TABLE": read.table,
            f"{name}_SPACING": read.spacing,
        }
        found |= {f"{name}_ZERO": layout.gain_zero, f"{name}_STEPS": layout.gain_steps, f"{name}_ALIGNED": read.aligned}
    return found


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
