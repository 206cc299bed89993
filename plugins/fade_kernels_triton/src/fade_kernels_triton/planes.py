"""Decode attention over a tier whose channels have widths of their own (``PlaneLayout``), in the space of its codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.interfaces import PlaneLayout
from fade_kernels_triton.device import interpreted, multiprocessors
from fade_kernels_triton.operands import MAX_COLUMNS, MAX_QUERIES, TILES

WIDTHS = (1, 2, 4)
GROUP = 16
"""Channels that share a width."""

MAX_KEPT = 256
RESIDENT = 8
"""Programs a multiprocessor that the number of splits aims at."""

MAX_SPLITS = 512
STAGES = 3


def unsupported_planes(layout: PlaneLayout, side: str) -> str:
    """Why the planes kernel cannot read codes of this layout; empty if it can."""
    wanted = "token" if side == "key" else "channel"
    if unknown := sorted(set(layout.levels) - set(WIDTHS)):
        return f"{side}s of {', '.join(map(str, unknown))} bits beside others (it reads planes of 1, 2 and 4)"
    if layout.group != GROUP:
        return f"{side}s whose channels share a width by {layout.group} (it reads groups of {GROUP}: group = {GROUP})"
    if layout.layout != wanted:
        return f"{side}s stored {layout.layout}-major (it reads {wanted}-major {side}s)"
    if layout.tile not in TILES:
        return f"tiles of {layout.tile} tokens (it reads 64 or 128)"
    if layout.kept > MAX_KEPT:
        return f"{layout.kept} stored channels (it reads up to {MAX_KEPT})"
    for width, levels in layout.levels.items():
        half = torch.tensor(levels).half()
        if not torch.equal(half, -half.flip(0)) or not bool((half[len(half) // 2 :] > 0).all()):
            return f"{width}-bit levels that are not symmetric about 0"
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


_facts: WeakKeyDictionary[PlaneLayout, Tensor] = WeakKeyDictionary()


def facts_of(layout: PlaneLayout) -> Tensor:
    """What the kernel reads of each group, int32 ``[H_kv, kept / 16, 8]`` on the tokens' device.

    First word, words between word rows, width (0: not stored), the bits of a code in eight nibbles, and the magnitudes of
    the levels as bytes: high bytes of the first four and of the other four, then their low bytes.
    """
    if layout not in _facts:
        groups = layout.channels[:, ::GROUP]
        tables = torch.zeros(max(WIDTHS) + 1, 5, dtype=torch.int32)
        for width, levels in layout.levels.items():
            tables[width] = _table(width, levels)
        found = torch.cat([groups[..., [1, 2, 0]].int(), tables[groups[..., 0].long()]], -1)
        _facts[layout] = found.contiguous().to(layout.usual.device)
    return _facts[layout]


def _table(width: int, levels: tuple[float, ...]) -> Tensor:
    """Mask and magnitudes of a width, read at the top of a nibble: int32 ``[5]``."""
    half = torch.tensor(levels).half()
    magnitudes = half[len(half) // 2 :].repeat_interleave(2 ** (max(WIDTHS) - width))
    numbers = [int(n) & 0xFFFF for n in magnitudes.view(torch.int16)]
    words = [sum(((n >> part) & 0xFF) << (8 * i) for i, n in enumerate(four))
             for part in (8, 0) for four in (numbers[:4], numbers[4:])]  # fmt: skip
    nibble = (0xF << (max(WIDTHS) - width)) & 0xF
    return torch.tensor([nibble * 0x11111111, *words]).to(torch.int32)  # the conversion wraps: the bits are what counts


def aligned(layout: PlaneLayout) -> bool:
    """Whether no word row of a group, and no channel's words, are cut between two heads' rows."""
    widest = max(layout.levels)
    return layout.row % max(GROUP, layout.tile * widest // 16) == 0


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
    from fade_kernels_triton.jit.decode import merge_kernel
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
    splits = splits or min(max(1, slots // groups), MAX_SPLITS, max(1, tier.max_tiles))
    interpret = interpreted()
    padded = max(16, _next_power_of_2(columns))
    out = torch.empty(rows, q_len, heads, values.kept, dtype=torch.float32, device=query.device).transpose(1, 2)
    lse = torch.empty(rows, heads, q_len, dtype=torch.float32, device=query.device)
    part = torch.empty(groups, splits, columns, values.kept, dtype=torch.float32, device=query.device)
    part_lse = torch.empty(groups, splits, columns, dtype=torch.float32, device=query.device)
    options: dict[str, Any] = {"num_warps": min(max(1, padded // 16), 4)}
    planes_kernel[(splits, groups)](
        query,
        tier.keys["codes"],
        tier.keys["gain"],
        facts_of(keys),
        keys.usual,
        tier.values["codes"],
        tier.values["gain"],
        facts_of(values),
        values.usual,
        tier.table,
        tier.count,
        tier.valid,
        part,
        part_lse,
        heads_kv,
        tier.max_tiles,
        splits,
        *query.stride()[:3],
        HEADS=group,
        Q_LEN=q_len,
        N=padded,
        **constants(keys, values),
        STAGES=STAGES + 2 * (tier.table is not None),
        INTERPRET=interpret,
        **options,
    )
    merge_kernel[(columns, groups)](
        part,
        part_lse,
        None,
        out,
        lse,
        splits,
        heads_kv,
        *out.stride()[:3],
        HEADS=group,
        Q_LEN=q_len,
        D=values.kept,
        DP=max(64, _next_power_of_2(values.kept)),
        CHUNK=16,
        PDL=False,
        num_warps=4,
    )
    return out, lse


def constants(keys: PlaneLayout, values: PlaneLayout) -> dict[str, Any]:
    """What the kernel is compiled for, of two layouts."""
    return {
        "KEY_GROUPS": keys.kept // GROUP,
        "KEY_PADDED": max(16, _next_power_of_2(keys.kept)),
        "VALUE_GROUPS": values.kept // GROUP,
        "KEY_ROW": keys.row,
        "KEY_ALIGNED": aligned(keys),
        "VALUE_ROW": values.row,
        "VALUE_ALIGNED": aligned(values),
        "VALUE_RUN": min(8, values.tile * min(values.levels) // 16),
        "TILE": keys.tile,
        "KEY_ZERO": keys.gain_zero,
        "KEY_STEPS": keys.gain_steps,
        "VALUE_ZERO": values.gain_zero,
        "VALUE_STEPS": values.gain_steps,
    }


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
