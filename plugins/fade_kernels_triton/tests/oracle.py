"""Random decode problems and float64 attention over what the quantizers decode."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.packed import Packed, PackedFormat
from fade_core.storage.tier_store import TierStore
from fade_kernels_triton.operands import PackedTier, Window


def seed() -> int:
    """Seed the generator afresh (or from FADE_SEED) and say with what."""
    value = int(os.environ.get("FADE_SEED", time.time_ns() % 2**31))
    print(f"FADE_SEED={value}")
    torch.manual_seed(value)
    return value


@dataclass
class TierCase:
    """A tier, and the float64 tokens it stands for."""

    tier: PackedTier
    keys: Tensor  # [B, H, T, D]
    values: Tensor
    mask: Tensor  # bool [B, H, T]
    positions: Tensor = field(default_factory=lambda: torch.empty(0))


def tier_case(
    rows: int, heads: int, max_tiles: int, dim: int, bits: int | tuple[int, int], axis: str, tile: int = 64, *,
    table: bool = False, ragged: bool = False, partial: bool = False, positions: bool = False, start: int = 0,
    device: str = "cpu",
    spread: float = 1.0, group: int = 0,
) -> TierCase:  # fmt: skip
    """A random tier of ``bits``, or of those of keys and of values; values in groups of ``group`` channels.

    Unused tiles hold NaN metadata; the pool is shuffled and larger than needed.
    """
    length = max_tiles * tile
    channel = torch.randn(1, heads, 1, dim, device=device)
    keys = torch.randn(rows, heads, length, dim, device=device) * spread + 2 * channel
    values = torch.randn(rows, heads, length, dim, device=device)
    key_bits, value_bits = (bits, bits) if isinstance(bits, int) else bits
    kq = UniformQuantizer(dim, key_bits, axis, tile=tile, layout="token")  # type: ignore[arg-type]
    vq = UniformQuantizer(dim, value_bits, "token", group=group, tile=tile, layout="channel")
    packed_k, packed_v = kq.encode(keys), vq.encode(values)
    wide_k = Packed(packed_k.fields, length, torch.float64)
    wide_v = Packed(packed_v.fields, length, torch.float64)
    count = torch.full((rows, heads), max_tiles, dtype=torch.int32, device=device)
    if ragged:
        count = torch.randint(0, max_tiles + 1, (rows, heads), dtype=torch.int32, device=device)
    valid = None
    token = torch.arange(length, device=device)
    mask = (token // tile) < count[..., None]
    if partial:
        valid = torch.randint(1, tile + 1, (rows, heads, max_tiles), dtype=torch.int32, device=device)
        mask = mask & ((token % tile).view(1, 1, -1) < valid.repeat_interleave(tile, dim=2))
    where = start + token.expand(rows, heads, length).to(torch.int32)
    if positions:
        gone = torch.rand(rows, heads, length, device=device) < 0.2
        where = torch.where(gone, -1, where)
        mask = mask & ~gone
    decoded_k, decoded_v = kq.decode(wide_k), vq.decode(wide_v)
    fields_k = {n: f.clone() for n, f in packed_k.fields.items()}
    fields_v = {n: f.clone() for n, f in packed_v.fields.items()}
    nan = torch.tensor([float("nan"), float("nan")], dtype=torch.float16).view(torch.int32).item()
    unused = torch.arange(max_tiles, device=device) >= count[..., None]
    fields_k["meta"][unused] = nan
    fields_v["meta"][unused] = nan
    stored = where.view(rows, heads, max_tiles, tile).contiguous() if positions else None
    ids = None
    if table:
        total = rows * heads * max_tiles
        pool = total + 3
        order = torch.randperm(pool, device=device)[:total]
        ids = order.view(rows, heads, max_tiles).to(torch.int32)

        def scatter(x: Tensor, fill: int) -> Tensor:
            out = torch.full((pool, *x.shape[3:]), fill, dtype=x.dtype, device=device)
            out[order] = x.flatten(0, 2)
            return out

        fields_k = {n: scatter(f, nan if n == "meta" else -1) for n, f in fields_k.items()}
        fields_v = {n: scatter(f, nan if n == "meta" else -1) for n, f in fields_v.items()}
        stored = scatter(stored, -1) if stored is not None else None
    tier = PackedTier(kq.fmt, vq.fmt, fields_k, fields_v, count, ids, valid, stored)
    return TierCase(tier, decoded_k, decoded_v, mask, where)


@dataclass
class WindowCase:
    """A window, and its float64 tokens."""

    window: Window
    keys: Tensor
    values: Tensor
    mask: Tensor
    positions: Tensor


def window_case(
    rows: int, heads: int, capacity: int, dim: int, dtype: torch.dtype, *, ragged: bool = False, at_least: int = 1,
    positions: bool = False, start: int = 0, device: str = "cpu",
) -> WindowCase:  # fmt: skip
    """A random window; what lies past its length is NaN."""
    keys = torch.randn(rows, heads, capacity, dim, device=device).to(dtype)
    values = torch.randn(rows, heads, capacity, dim, device=device).to(dtype)
    length = torch.full((rows,), capacity, dtype=torch.int32, device=device)
    if ragged:
        length = torch.randint(at_least, capacity + 1, (rows,), dtype=torch.int32, device=device)
    token = torch.arange(capacity, device=device)
    mask = (token < length[:, None])[:, None].expand(rows, heads, capacity)
    keys64, values64 = keys.double(), values.double()
    keys, values = keys.clone(), values.clone()
    keys[~mask] = float("nan")
    values[~mask] = float("nan")
    where = start + token.expand(rows, heads, capacity).to(torch.int32)
    window = Window(keys, values, length, where[:, 0].contiguous() if positions else None)
    return WindowCase(window, keys64, values64, mask, where)


def attend64(
    query: Tensor, tiers: list[TierCase], window: WindowCase | None, *, scaling: float | None = None,
    softcap: float | None = None, sliding_window: int | None = None, s_aux: Tensor | None = None,
    query_positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The same attention in float64: output ``[B, H_q, Q, D]`` and natural log-sum-exp ``[B, H_q, Q]``."""
    rows, heads, q_len, dim = query.shape
    parts = [*tiers, *([window] if window is not None else [])]
    keys = torch.cat([p.keys for p in parts], 2)
    values = torch.cat([p.values for p in parts], 2)
    visible = torch.cat([p.mask for p in parts], 2)[:, :, None].expand(-1, -1, q_len, -1).clone()
    if query_positions is not None:
        where = torch.cat([p.positions for p in parts], 2)[:, :, None]
        now = query_positions[:, None, :, None]
        visible &= where <= now
        if sliding_window is not None:
            visible &= now - where < sliding_window
    elif window is not None and q_len > 1:
        capacity = window.keys.shape[2]
        token = torch.arange(capacity, device=query.device)
        query_token = torch.arange(q_len, device=query.device)
        last = window.window.length[:, None] - q_len + query_token
        visible[..., -capacity:] &= (token <= last[..., None])[:, None]
    group = heads // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    visible = visible.repeat_interleave(group, 1)
    score = query.double() @ keys.transpose(-1, -2) * (dim**-0.5 if scaling is None else scaling)
    if softcap is not None:
        score = softcap * torch.tanh(score / softcap)
    score = score.masked_fill(~visible, float("-inf"))
    if s_aux is not None:
        score = torch.cat([score, s_aux.double().view(1, -1, 1, 1).expand(rows, -1, q_len, 1)], -1)
    lse = torch.logsumexp(score, -1)
    weight = torch.exp(score - lse.where(lse > float("-inf"), torch.zeros_like(lse))[..., None])
    if s_aux is not None:
        weight = weight[..., :-1]
    return weight @ values, lse


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """``|found - wanted| / |wanted|``; NaN counts as infinite."""
    error = float((found.double() - wanted).norm() / wanted.norm())
    return error if error == error else float("inf")


def scatter(store: TierStore) -> None:
    """A shuffled pool with free tiles between those in use, and rubbish in them: the table is read."""
    count, ids = store.pool.capacity, store.table.ids.host
    order = torch.randperm(count + 5)[:count]
    for name, tiles in store.pool.fields.items():
        bits = 8 if tiles.dtype == torch.uint8 else 15
        pool = torch.randint(2**bits, (count + 5, *tiles.shape[1:]), device=tiles.device).to(tiles.dtype)
        pool[order.to(tiles.device)] = tiles
        store.pool.fields[name] = pool
    store.pool.capacity = count + 5
    ids.copy_(torch.where(ids >= 0, order[ids.clamp_min(0).long()], -1))
    store._changed()


def format_of(bits: int, dim: int, axis: str, tile: int, side: str) -> PackedFormat:
    return PackedFormat(bits, dim, tile, axis, layout="token" if side == "key" else "channel")  # type: ignore[arg-type]
