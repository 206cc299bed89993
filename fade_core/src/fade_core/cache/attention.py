"""FADE's attention function: registered with transformers, it reads packed tiers where stock attention reads tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from fade_core.cache.handle import CompiledHandle, Handle, is_handle
from fade_core.cache.layer import TieredLayer
from fade_core.cache.prompt import dense_with_past, past_masks
from fade_core.interfaces import PromptView
from fade_core.ops.attention import AttentionOutput, FullSegment, decode_attention
from fade_core.support.transfer import sent

NAME = "fade"
_OBSERVED = 16  # queries whose attention the tracker sees at once


def fade_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor | CompiledHandle,
    value: Tensor | CompiledHandle,
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
        key: a ``Handle``, a ``CompiledHandle`` inside a compiled graph, or ``[B, H_kv, T, D]``.
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
    if isinstance(key, CompiledHandle):
        if not key.stepping:
            return _eagerly(module, query, key.layer, attention_mask, scaling, softcap, s_aux), None
        output = key.layer.attend_compiled(query, _as_bool(attention_mask), scaling, softcap, s_aux)
        return output.transpose(1, 2).contiguous(), None
    value = cast(Tensor, value)
    if not is_handle(key):
        if not softcap and s_aux is None:
            plain: tuple[Tensor, None] = sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
            )
            return plain
        output = blocked_attention(query, key, value, attention_mask, scaling, softcap, s_aux).output
        return output.transpose(1, 2).contiguous(), None
    return _eagerly(module, query, cast(Handle, key).layer, attention_mask, scaling, softcap, s_aux), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eagerly(
    module: torch.nn.Module,
    query: Tensor,
    layer: TieredLayer,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention ``[B, Q, H_q, D]`` over a layer of the cache, which may then compress what it has taken in."""
    mask = _as_bool(attention_mask)
    if layer.pending is not None:
        output = _chunk_attention(module, layer, query, mask, scaling, softcap, sinks)
    else:
        if mask is not None and _is_plain(mask, layer):
            mask = None
        if mask is not None:
            mask = mask[..., : layer.logical]
        output = layer.attend(query, mask, scaling, softcap, sinks)
    if layer.compiles and query.device.type != "cpu":  # on a CPU every step's mask is read
        layer.trusting = attention_mask is None or _is_plain(_last_query(attention_mask), layer)
    cache = None if layer.owner is None else layer.owner()
    if cache is not None:
        cache.conclude()
    return output.transpose(1, 2).contiguous()


def _last_query(mask: Tensor) -> Tensor:
    """The mask of the newest query alone, bool ``[B or 1, 1, 1, T]``."""
    return cast(Tensor, _as_bool(mask))[:, :, -1:]


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
    chunk, queries = keys.shape[2], query.shape[2]
    padding = _leading_padding(mask, chunk) if mask is not None and bool((layer.lengths == chunk).any()) else None
    past = layer.logical > chunk
    if past:
        keys, values = dense_with_past(layer, mask)

    def visible(part: slice | Tensor) -> Tensor:
        rows = _visible(mask, part, queries, layer.logical, query.device)
        if not past:
            return rows
        masks = [*past_masks(layer, rows), rows[..., -chunk:]]
        heads = max(m.shape[1] for m in masks)
        return torch.cat([m.expand(query.shape[0], heads, -1, -1) for m in masks], dim=3)

    apart = past and any(store.tiles and not store.heads_aligned for store in layer.stores)
    if softcap or sinks is not None or apart:
        output = _in_blocks(query, keys, values, visible, scaling, softcap, sinks).output
    else:
        seen = visible(slice(0, queries)) if past else mask
        output = sdpa_attention_forward(module, query, keys, values, seen, scaling=scaling)[0].transpose(1, 2)
        del seen
    if layer.reading:
        _reread(layer, query, keys, visible, scaling, softcap, sinks)
        layer.finish_pending()
        return output
    observed = None
    if layer.plan.tracker.active and layer.plan.ladder.bounded:
        observed = _observe(layer, query, keys, visible, scaling, softcap, sinks)
    _observe_queries(layer, query, scaling, padding)
    if layer.learning:
        layer.learn(PromptView(query, keys, values, scaling, softcap, sinks, visible, module))
    del keys, values  # the layer alone holds them now, and drops them as it packs
    layer.finish_pending(padding, observed)
    return output


def _observe(
    layer: TieredLayer,
    query: Tensor,
    keys: Tensor,
    visible: Callable[[slice], Tensor],
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> dict[str, Tensor]:
    """Feed the tracker with the chunk's last queries; statistics of the chunk's own tokens are returned."""
    tracker, (heads, tokens), queries = layer.plan.tracker, keys.shape[1:3], query.shape[2]
    groups = query.shape[1] // heads
    chunk = cast(tuple[Tensor, Tensor], layer.pending)[0].shape[2]
    own = {n: keys.new_zeros((*keys.shape[:2], chunk), dtype=torch.float32) for n in tracker.statistics}
    held = [*(layer.statistics() if tokens > chunk else ()), own]
    sizes = [next(iter(statistics.values())).shape[2] for statistics in held]
    for statistics in held:
        tracker.age(statistics, queries)
    for start in range(queries - tracker.observed(queries), queries, _OBSERVED):
        part = slice(start, min(start + _OBSERVED, queries))
        seen = visible(part)
        for head in range(heads):  # one at a time: logits of all heads would outweigh the keys
            ours = slice(head, head + 1)
            saw = seen if seen.shape[1] == 1 else seen[:, ours]
            segment = FullSegment(keys[:, ours], keys[:, ours, :, :1], saw)
            mine = slice(head * groups, (head + 1) * groups)
            sink = None if sinks is None else sinks[mine]
            found = decode_attention(query[:, mine, part], [segment], scaling, softcap, sink, probabilities=True)
            split = cast(list[Tensor], found.probabilities)[0].split(sizes, dim=3)
            shown = saw.expand(-1, -1, -1, tokens).split(sizes, dim=3)
            for statistics, probabilities, view in zip(held, split, shown, strict=True):
                tracker.observe({n: t[:, ours] for n, t in statistics.items()}, probabilities, view)
    return own


def _reread(
    layer: TieredLayer,
    query: Tensor,
    keys: Tensor,
    visible: Callable[[slice], Tensor],
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Feed the statistic "reread" of what is stored with a chunk that only reads; padded queries have no say."""
    held = layer.statistics()
    if not any("reread" in statistics for statistics in held):
        return
    (batch, heads), queries = keys.shape[:2], query.shape[2]
    groups = query.shape[1] // heads
    block = max(_OBSERVED, heads * keys.shape[3] // groups)  # whose logits take no more elements than the keys do
    sizes = [statistics["reread"].shape[2] for statistics in held]
    for start in range(0, queries, block):
        part = slice(start, min(start + block, queries))
        seen = visible(part)
        itself = seen[..., -queries:].diagonal(start, -2, -1)[..., None]
        for head in range(heads):
            ours, mine = slice(head, head + 1), slice(head * groups, (head + 1) * groups)
            saw, own = (t if t.shape[1] == 1 else t[:, ours] for t in (seen, itself))
            alike = keys[:, ours].expand(batch, groups, -1, -1)  # a key head for each query head: none is averaged away
            segment = FullSegment(alike, alike[..., :1], saw)
            sink = None if sinks is None else sinks[mine]
            found = decode_attention(query[:, mine, part], [segment], scaling, softcap, sink, probabilities=True)
            given = cast(list[Tensor], found.probabilities)[0][..., :-queries].float() * own
            for statistics, most in zip(held, given.amax(1, keepdim=True).split(sizes, dim=3), strict=True):
                layer.plan.tracker.observe_rereading({n: t[:, ours] for n, t in statistics.items()}, most)


def _observe_queries(layer: TieredLayer, query: Tensor, scaling: float, padding: Tensor | None) -> None:
    """Feed the layer's query statistics, if any are kept; ``padding``: leading columns of rows still empty."""
    if layer.queries is None:
        return
    tracker, count = layer.plan.tracker, query.shape[2]
    first = count - tracker.observed(count)
    real = None
    if padding is not None and layer.window is not None:
        dropped = torch.where(layer.window.lengths == 0, padding, 0)
        real = sent(torch.arange(first, count) >= dropped[:, None], query.device)
    layer.queries.observe(query[:, :, first:] * scaling, tracker.keeps(count), real)


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
    mask = _as_bool(mask)

    def visible(part: slice) -> Tensor:
        return _visible(mask, part, query.shape[2], key.shape[2], query.device)

    return _in_blocks(query, key, value, visible, scaling, softcap, sinks)


def _in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Callable[[slice], Tensor],
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> AttentionOutput:
    """Exact attention in blocks of queries; ``visible`` gives the mask of each, ``[B or 1, H_kv or 1, block, T]``."""
    total, block = query.shape[2], _block(query, key)
    found = [
        decode_attention(query[:, :, part], [FullSegment(key, value, visible(part))], scaling, softcap, sinks)
        for part in (slice(start, min(start + block, total)) for start in range(0, total, block))
    ]
    return AttentionOutput(torch.cat([f.output for f in found], 2), torch.cat([f.lse for f in found], 2))


def _block(query: Tensor, key: Tensor) -> int:
    """Queries whose logits take no more elements than the keys do, at least 16."""
    return max(16, key.shape[1] * key.shape[3] // query.shape[1])


def _visible(mask: Tensor | None, part: slice | Tensor, queries: int, tokens: int, device: torch.device) -> Tensor:
    """bool ``[B or 1, H or 1, len(part), tokens]`` of what the queries ``part`` may see."""
    if mask is not None:
        return mask[:, :, part, :tokens]
    asked = torch.arange(part.start, part.stop, device=device) if isinstance(part, slice) else part
    newest = tokens - queries + asked
    return (torch.arange(tokens, device=device) <= newest[:, None])[None, None]


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
    padded = where < sent(layer.padding, mask.device)[:, None, None, None]
    answer = bool(((mask[..., : layer.logical] == (where <= newest[:, None])) | padded).all())
    _plain_memo[:] = [(weakref.ref(mask), layer.logical, layer.padding, answer)]
    return answer


def register() -> None:
    """Make ``attn_implementation="fade"`` known to transformers, masks included (without one padding is ignored)."""
    AttentionInterface.register(NAME, fade_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()
