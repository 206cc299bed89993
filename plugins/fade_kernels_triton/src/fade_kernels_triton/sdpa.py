"""Attention over INT4 keys and values as functions of tensors, without a cache.

The tensors are the fields of ``fade_core.get_quantizer("uniform", bits=4, head_dim=D, side=..., axis=...)``, layout in
``fade_core.packed``. A tile is ``tile`` tokens (64 or 128) and ``n`` tiles follow one another, so ``T = n * tile``:

    q         [B, H_q, Q, D]                   float16 or bfloat16 (float32 too in torch), H_q a multiple of H_kv
    k_packed  [B, H_kv, n, tile // 4, D]       int16, field "codes4" of the keys
    k_scale   [B, H_kv, n, 1, tile or D]       int32, field "meta": a scale a token or a scale a channel of the tile
    v_packed  [B, H_kv, n, D, tile // 4]       int16, field "codes4" of the values
    v_scale   [B, H_kv, n, 1, tile]            int32, field "meta" of the values: a scale a token
"""

from __future__ import annotations

import torch
from torch import Tensor

from fade_core.errors import ConfigError, InputError
from fade_core.packed import Axis, PackedFormat, unpack_codes, unpack_meta
from fade_kernels_triton.decode import decode_attention
from fade_kernels_triton.device import DTYPES, unusable
from fade_kernels_triton.operands import HEAD_DIMS, MAX_COLUMNS, MAX_QUERIES, PackedTier, unsupported_format

BITS = 4
TOKENS_A_WORD = 16 // BITS


def fused_int4_sdpa(
    q: Tensor,
    k_packed: Tensor,
    k_scale: Tensor,
    v_packed: Tensor,
    v_scale: Tensor,
    *,
    scaling: float | None = None,
    axis: Axis | None = None,
) -> Tensor:
    """Attention of ``q`` to all ``T`` packed tokens by the Triton kernel; nothing is dequantised to memory.

    Shapes: in the module's docstring. No mask: every query sees every token.

    Args:
        q, k_packed, k_scale, v_packed, v_scale: as above.
        scaling: softmax scale, ``D ** -0.5`` by default.
        axis: "token" or "channel", what a key scale belongs to; needed only where ``tile == D``.

    Returns:
        ``[B, H_q, Q, D]`` in the dtype of ``q``.

    Raises:
        InputError: for tensors that do not fit one another.
        ConfigError: where the kernel cannot run, with the reason; ``int4_sdpa`` takes torch then.
    """
    keys, values = _formats(q, k_packed, k_scale, v_packed, v_scale, axis)
    if reason := _unfused(q, keys, values):
        raise ConfigError(f"the fused INT4 kernel cannot run this: {reason}; int4_sdpa falls back to torch")
    rows, heads, tiles = k_packed.shape[:3]
    tier = PackedTier(
        keys,
        values,
        {"codes4": k_packed.contiguous(), "meta": k_scale.contiguous()},
        {"codes4": v_packed.contiguous(), "meta": v_scale.contiguous()},
        torch.full((rows, heads), tiles, dtype=torch.int32, device=q.device),
    )
    group = q.shape[1] // heads
    step = min(MAX_QUERIES, MAX_COLUMNS // group)
    parts = [decode_attention(part.contiguous(), [tier], scaling=scaling)[0] for part in q.split(step, dim=2)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def int4_sdpa(
    q: Tensor,
    k_packed: Tensor,
    k_scale: Tensor,
    v_packed: Tensor,
    v_scale: Tensor,
    *,
    scaling: float | None = None,
    axis: Axis | None = None,
    force_triton: bool | None = None,
) -> Tensor:
    """``fused_int4_sdpa`` where its kernel runs, else the same attention in torch, computed in float32.

    Args:
        q, k_packed, k_scale, v_packed, v_scale, scaling, axis: as ``fused_int4_sdpa``.
        force_triton: ``None`` takes Triton where it runs, ``True`` insists on it, ``False`` takes torch.

    Returns:
        ``[B, H_q, Q, D]`` in the dtype of ``q``.

    Raises:
        InputError: for tensors that do not fit one another.
        ConfigError: if Triton is insisted on and cannot run, with the reason.
    """
    keys, values = _formats(q, k_packed, k_scale, v_packed, v_scale, axis)
    if force_triton or (force_triton is None and not _unfused(q, keys, values)):
        return fused_int4_sdpa(q, k_packed, k_scale, v_packed, v_scale, scaling=scaling, axis=axis)
    wide_k = dequantized(k_packed, k_scale, keys)
    wide_v = dequantized(v_packed, v_scale, values)
    grouped = q.float().reshape(q.shape[0], wide_k.shape[1], -1, q.shape[-1])
    scores = grouped @ wide_k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    return (torch.softmax(scores, -1) @ wide_v).reshape(q.shape).to(q.dtype)


def dequantized(codes: Tensor, meta: Tensor, fmt: PackedFormat, dtype: torch.dtype = torch.float32) -> Tensor:
    """What packed words mean: ``[B, H_kv, T, D]``, computed in ``dtype``."""
    x = unpack_codes(codes, fmt.bits, fmt.layout, dtype)  # [B, H, n, tile, D], or [..., D, tile] channel-major
    x = x.transpose(-1, -2) if fmt.layout == "channel" else x
    scale, minimum = (part.to(dtype) for part in unpack_meta(meta))  # [B, H, n, 1, tile or D]
    if fmt.axis == "token":
        scale, minimum = scale.transpose(-1, -2), minimum.transpose(-1, -2)
    return (x * scale + minimum).flatten(2, 3)


def _formats(
    q: Tensor, k_packed: Tensor, k_scale: Tensor, v_packed: Tensor, v_scale: Tensor, axis: Axis | None
) -> tuple[PackedFormat, PackedFormat]:
    """Formats of keys and values, told by the shapes. Raises ``InputError`` if they do not fit one another."""
    if q.dim() != 4 or k_packed.dim() != 5:
        raise InputError(
            f"q must be [B, H_q, Q, D] and k_packed [B, H_kv, n, tile // 4, D]; "
            f"found {tuple(q.shape)} and {tuple(k_packed.shape)}"
        )
    rows, heads, tiles, words, dim = k_packed.shape
    tile = words * TOKENS_A_WORD
    if axis is None:
        if tile == dim:
            raise InputError(f"tile and D are both {dim}: say axis='token' or axis='channel'")
        axis = "channel" if k_scale.shape[-1] == dim else "token"
    lead = (rows, heads, tiles)
    wanted = {
        "q": (q, (rows, q.shape[1], q.shape[2], dim), None),
        "k_packed": (k_packed, (*lead, words, dim), torch.int16),
        "k_scale": (k_scale, (*lead, 1, tile if axis == "token" else dim), torch.int32),
        "v_packed": (v_packed, (*lead, dim, words), torch.int16),
        "v_scale": (v_scale, (*lead, 1, tile), torch.int32),
    }
    for name, (tensor, shape, dtype) in wanted.items():
        if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
            raise InputError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}; {dtype or 'floating'} {shape} is needed")
    if not q.is_floating_point() or not q.shape[2] or not tiles or q.shape[1] % heads:
        raise InputError(
            f"{q.dtype} queries {tuple(q.shape)} over {tiles} tiles of {heads} heads: floating queries, at least one "
            f"query and tile, and H_q a multiple of H_kv are needed"
        )
    keys = PackedFormat(BITS, dim, tile, axis, layout="token")
    return keys, PackedFormat(BITS, dim, tile, "token", layout="channel")


def _unfused(q: Tensor, keys: PackedFormat, values: PackedFormat) -> str:
    """Why the kernel cannot take the call; empty if it can."""
    if reason := unusable(q.device):
        return reason
    if q.dtype not in DTYPES:
        return f"{q.dtype} queries (it takes {', '.join(map(str, DTYPES))})"
    if q.shape[-1] not in HEAD_DIMS:
        return f"head_dim {q.shape[-1]} (it takes {', '.join(map(str, HEAD_DIMS))})"
    return unsupported_format(keys, "key") or unsupported_format(values, "value")
