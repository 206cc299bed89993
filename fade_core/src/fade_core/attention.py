"""FADE's attention function: registered with transformers, it reads packed tiers where stock attention reads tensors."""

from __future__ import annotations

import weakref
from typing import Any, cast

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from fade_core.handle import Handle, is_handle
from fade_core.kernels.attention import AttentionOutput, FullSegment, TorchDecodeAttention, decode_attention
from fade_core.layer import TieredLayer

NAME = "fade"
_BLOCK = 256  # queries that torch attends at once where a fused kernel cannot be used
_ORACLE = TorchDecodeAttention()


def fade_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over whatever the cache returned: a packed layer, or plain tensors of any other cache.

    Args:
        module: the model's attention module.
        query: ``[B, H_q, Q, D]``.
        key: a ``Handle``, or ``[B, H_kv, T, D]``.
        value: likewise.
        attention_mask: bool ``[B, 1, Q, T]`` over logical positions, or ``None``.
        dropout: for plain tensors in training; a packed cache is not trained through.
        scaling: factor of the logits, ``D ** -0.5`` by default.
        softcap: soft cap of the logits.
        s_aux: attention-sink logits ``[H_q]``.

    Returns:
        output ``[B, Q, H_q, D]`` and ``None`` in place of attention weights.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not is_handle(key):
        if not softcap and s_aux is None:
            plain: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return plain
        output = blocked_attention(query, key, value, attention_mask, scaling, softcap, s_aux).output
        return output.transpose(1, 2).contiguous(), None
    layer = cast(Handle, key).layer
    mask = _as_bool(attention_mask)
    if layer.pending is not None:
        output = _chunk_attention(module, layer, query, mask, scaling, softcap, s_aux)
    else:
        output = _step_attention(layer, query, mask, scaling, softcap, s_aux)
    return output.transpose(1, 2).contiguous(), None


def _step_attention(
    layer: TieredLayer, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """A few new tokens, already in the window: every tier is read in place."""
    if mask is not None and _is_plain(mask, layer):
        mask = None
    segments = layer.segments(mask, query.shape[2])
    held = layer.statistics()
    tracked = any(held)
    kernel = layer.plan.kernel
    support = kernel.accepts(query, segments, scaling, softcap, sinks, probabilities=tracked)
    if not support:
        layer.fall_back(kernel, support.reason)
        kernel = _ORACLE
    result: AttentionOutput = kernel(query, segments, scaling, softcap, sinks, probabilities=tracked)
    if tracked:
        found = result.probabilities or [
            layer.plan.mass_kernel(query, segment, result.lse, scaling, softcap) for segment in segments
        ]
        for statistics, probabilities, segment in zip(held, found, segments, strict=True):
            layer.plan.tracker.observe(statistics, probabilities, segment.mask)
    layer.settle()
    return result.output


def _chunk_attention(
    module: torch.nn.Module,
    layer: TieredLayer,
    query: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """A prompt, or a chunk of one: exact among its own tokens, over the packed past before it."""
    keys, values = cast(tuple[Tensor, Tensor], layer.pending)
    chunk = keys.shape[2]
    padding = _leading_padding(mask, chunk) if mask is not None and bool((layer.lengths == chunk).any()) else None
    segments = layer.segments(mask, query.shape[2]) if layer.logical > chunk else []
    if segments:
        parts = [(s.keys, s.values) if isinstance(s, FullSegment) else s.store.decoded() for s in segments]
        own = _own_mask(mask, chunk, query)
        masks = [
            s.mask if s.mask is not None else own.new_ones(1, 1, 1, p[0].shape[2])
            for s, p in zip(segments, parts, strict=True)
        ]
        masks.append(own)
        heads = max(m.shape[1] for m in masks)
        shape = (query.shape[0], heads, query.shape[2])
        seen: Tensor | None = torch.cat([m.expand(*shape, m.shape[3]) for m in masks], dim=3)
        all_keys = torch.cat([p[0] for p in parts] + [keys], dim=2)
        all_values = torch.cat([p[1] for p in parts] + [values], dim=2)
    else:
        all_keys, all_values, seen = keys, values, mask
    if softcap or sinks is not None or (seen is not None and seen.shape[1] > 1):
        output = blocked_attention(query, all_keys, all_values, seen, scaling, softcap, sinks).output
    else:
        output = sdpa_attention_forward(module, query, all_keys, all_values, seen, scaling=scaling)[0].transpose(1, 2)
    observed = None
    if layer.plan.tracker.active and layer.plan.ladder.bounded:
        observed = _observe(layer, query, all_keys, all_values, seen, scaling, softcap, sinks)
    layer.settle(padding, observed)
    return output


def _observe(
    layer: TieredLayer,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> dict[str, Tensor]:
    """Feed the tracker with the chunk's last queries; statistics of the chunk's own tokens are returned."""
    tracker = layer.plan.tracker
    count = tracker.observed(query.shape[2])
    first = query.shape[2] - count
    held = layer.statistics() if keys.shape[2] > query.shape[2] else []
    own = {n: keys.new_zeros((*keys.shape[:2], query.shape[2]), dtype=torch.float32) for n in tracker.statistics}
    sizes = [next(iter(s.values())).shape[2] for s in held] + [query.shape[2]]
    for start in range(first, query.shape[2], _BLOCK):
        part = slice(start, min(start + _BLOCK, query.shape[2]))
        visible = _visible(mask, part, query.shape[2], keys.shape[2], query.device)
        found = decode_attention(
            query[:, :, part],
            [FullSegment(keys, values[..., :1], visible)],
            scaling,
            softcap,
            sinks,
            probabilities=True,
        ).probabilities
        split = cast(list[Tensor], found)[0].split(sizes, dim=3)
        seen = visible.expand(-1, -1, -1, keys.shape[2]).split(sizes, dim=3)
        for statistics, probabilities, saw in zip([*held, own], split, seen, strict=True):
            tracker.observe(statistics, probabilities, saw)
    return own


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> AttentionOutput:
    """Exact attention in blocks of queries, with soft cap and sinks; causal where ``mask`` is ``None``."""
    total = query.shape[2]
    outputs, lses = [], []
    mask = _as_bool(mask)
    for start in range(0, total, _BLOCK):
        part = slice(start, min(start + _BLOCK, total))
        visible = _visible(mask, part, total, key.shape[2], query.device)
        found = decode_attention(query[:, :, part], [FullSegment(key, value, visible)], scaling, softcap, sinks)
        outputs.append(found.output)
        lses.append(found.lse)
    return AttentionOutput(torch.cat(outputs, 2), torch.cat(lses, 2))


def _visible(mask: Tensor | None, part: slice, queries: int, tokens: int, device: torch.device) -> Tensor:
    """bool ``[B or 1, H or 1, len(part), tokens]`` of what the queries ``part`` may see."""
    if mask is not None:
        return mask[:, :, part, :tokens]
    newest = torch.arange(tokens - queries + part.start, tokens - queries + part.stop, device=device)
    return (torch.arange(tokens, device=device) <= newest[:, None])[None, None]


def _own_mask(mask: Tensor | None, chunk: int, query: Tensor) -> Tensor:
    """bool ``[B or 1, 1, Q, chunk]``: what the chunk's queries see of the chunk."""
    if mask is not None:
        return mask[..., -chunk:]
    return torch.ones((chunk, chunk), dtype=torch.bool, device=query.device).tril()[None, None]


def _as_bool(mask: Tensor | None) -> Tensor | None:
    """A boolean mask; an additive one forbids what it pushes below half of its dtype's range."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


_padding_memo: list[tuple[weakref.ref[Tensor], int, Tensor]] = []


def _leading_padding(mask: Tensor, chunk: int) -> Tensor:
    """Columns of the chunk before the first one that its last query sees, int64 ``[B]`` on the CPU.

    All layers of a forward pass share one mask: it is read once.
    """
    if _padding_memo and _padding_memo[0][0]() is mask and _padding_memo[0][1] == chunk:
        return _padding_memo[0][2]
    seen = mask[:, 0, -1, -chunk:].cpu()
    padding = torch.where(seen.any(-1), seen.int().argmax(-1), chunk)
    _padding_memo[:] = [(weakref.ref(mask), chunk, padding)]
    return padding


_plain_memo: list[tuple[weakref.ref[Tensor], int, Tensor, bool]] = []


def _is_plain(mask: Tensor, layer: TieredLayer) -> bool:
    """Whether ``mask`` hides nothing but leading padding, which is not stored, and tokens after the query.

    All layers of a forward pass share one mask: it is read once.
    """
    if _plain_memo:
        known, length, padding, answer = _plain_memo[0]
        if known() is mask and length == layer.logical and torch.equal(padding, layer.padding):
            return answer
    where = torch.arange(layer.logical, device=mask.device)
    newest = torch.arange(layer.logical - mask.shape[2], layer.logical, device=mask.device)
    padded = where < layer.padding.to(mask.device)[:, None, None, None]
    answer = bool(((mask[..., : layer.logical] == (where <= newest[:, None])) | padded).all())
    _plain_memo[:] = [(weakref.ref(mask), layer.logical, layer.padding, answer)]
    return answer


def register() -> None:
    """Make ``attn_implementation="fade"`` known to transformers, masks included (without one padding is ignored)."""
    AttentionInterface.register(NAME, fade_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()
