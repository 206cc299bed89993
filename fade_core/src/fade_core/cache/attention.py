"""FADE's attention function: registered with transformers, it reads packed tiers where stock attention reads tensors."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    ALL_MASK_ATTENTION_FUNCTIONS,
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
)
from transformers.modeling_utils import AttentionInterface

from fade_core.cache.attachment import NAME, own_attention, own_name, replaced_name
from fade_core.cache.layer import CompiledHandle, Handle, TieredLayer
from fade_core.cache.masks import newest
from fade_core.cache.prompt import dense_with_past, past_masks, past_shifts
from fade_core.errors import NonFiniteError
from fade_core.interfaces import PromptView
from fade_core.ops.reference import FullSegment, Segment, decode_attention
from fade_core.ops.step import read_all
from fade_core.support.recording import recorded
from fade_core.support.transfer import sent

_OBSERVED = 16  # queries whose attention the tracker sees at once

Visible = Callable[[slice | Tensor], Tensor]
"""The mask of some queries, bool ``[B or 1, H_kv or 1, block, T]``."""


class _Call(NamedTuple):
    """What attention is asked: queries ``[B, H_q, Q, D]``, and the rest as in ``fade_attention``; the mask is boolean."""

    query: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None
    sinks: Tensor | None


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
) -> tuple[Tensor, Tensor | None]:
    """Attention over whatever the cache returned: a packed layer, or plain tensors of any other cache.

    Args:
        module: the model's attention module.
        query: ``[B, H_q, Q, D]``.
        key: a ``Handle``, a ``CompiledHandle`` inside a compiled graph, or ``[B, H_kv, T, D]``.
        value: likewise.
        attention_mask: over logical positions, ``[B or 1, H or 1, Q, T]``, or ``[B, T]`` where it hides padding alone; ``None``
            if queries see all that came before them.
        dropout: for plain tensors in training; a packed cache is not trained through.
        scaling: factor of the logits, ``D ** -0.5`` by default.
        softcap: soft cap of the logits.
        s_aux: attention-sink logits ``[H_q]``.

    Returns:
        output ``[B, Q, H_q, D]`` and ``None`` in place of attention weights (but for plain tensors, where the model runs
        FADE's attention only because another thread is in a pass of FADE's: what its own gives).
    """
    if not isinstance(key, (CompiledHandle, Handle)) and (own := own_attention(module)) is not None:
        more = {name: given for name, given in (("softcap", softcap), ("s_aux", s_aux)) if given is not None}
        found: tuple[Tensor, Tensor | None] = own(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **more, **kwargs
        )
        return found
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = _Call(query, as_bool(attention_mask), scaling, softcap, s_aux)
    if isinstance(key, CompiledHandle):
        output = key.layer.steps.attend_compiled(*call) if key.stepping else _eagerly(module, key.layer, call)
    elif isinstance(key, Handle):
        output = _eagerly(module, key.layer, call)
    elif softcap or s_aux is not None:
        visible, attend = partial(rows_of, call, key.shape[2]), partial(_exact, key, cast(Tensor, value))
        output = _in_blocks(call, key, visible, query.shape[1], attend)
    else:
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = rows_of(call, key.shape[2])
        given = module, query, key, cast(Tensor, value), attention_mask
        plain: tuple[Tensor, None] = sdpa_attention_forward(*given, dropout=dropout, scaling=scaling, **kwargs)
        return plain
    return output.transpose(1, 2).contiguous(), None  # [B, Q, H_q, D]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _eagerly(module: torch.nn.Module, layer: TieredLayer, call: _Call) -> Tensor:
    """Attention ``[B, H_q, Q, D]`` over a layer of the cache, which may then compress what it has taken in."""
    cache = None if layer.owner is None else layer.owner()
    if cache is not None:
        cache.attends(layer)
    output = _step_attention(layer, call) if layer.pending is None else _chunk_attention(module, layer, call)
    if layer.steps.compiles and layer.device.type != "cpu" and not layer.reading:  # on a CPU every step's mask is read
        layer.steps.assume_padding_mask = call.mask is None or _hides_padding_alone(layer, call.mask, last=True)
    if cache is not None:
        cache.attended()
    return output


def _hides_padding_alone(layer: TieredLayer, mask: Tensor, last: bool = False) -> bool:
    return layer.plan.masks.hides_padding_alone(mask, layer.logical, layer.known.padding, last)


def _step_attention(layer: TieredLayer, call: _Call) -> Tensor:
    """A few new tokens, which lie in the window by now."""
    held, steps, mask, shifts = layer.known, layer.steps, None, None
    if call.mask is not None and not _hides_padding_alone(layer, call.mask):
        mask = rows_of(call, held.logical)
        shifts = past_shifts(held, layer.plan.rope, newest(mask), held.logical)
    options = mask, call.sinks, call.scaling, call.softcap, shifts
    output = read_all(steps.step_plan, call.query, steps.buffers or steps.wire(held), *options)
    if steps.step_plan.refused:
        steps.tell_refused()
    return output


def _chunk_attention(module: torch.nn.Module, layer: TieredLayer, call: _Call) -> Tensor:
    """A prompt, or a chunk of one: exact among its own tokens, over the packed past before it."""
    held, (keys, values), mask = layer.held, cast(tuple[Tensor, Tensor], layer.pending), call.mask
    chunk = keys.shape[2]
    padding = alone = None
    if mask is not None and bool((held.lengths == chunk).any()):
        padding = layer.plan.masks.leading_padding(mask, chunk)
    past = held.logical > chunk
    if past:
        shown = None if mask is None else newest(mask)
        keys, values = dense_with_past(held, keys, values, shown, layer.plan.rope)
    elif padding is not None and mask is not None and mask.dim() == 2:
        alone = padding if layer.plan.masks.hides_padding_alone(mask, chunk, padding) else None

    def visible(part: slice | Tensor) -> Tensor:
        rows = rows_of(call, held.logical, part)
        if not past:
            return rows
        masks = [*past_masks(held, rows), rows[..., -chunk:]]
        heads = max(m.shape[1] for m in masks)
        return torch.cat([m.expand(held.rows, heads, -1, -1) for m in masks], dim=3)

    # before attention: while it is under way, the host works out what was learnt
    learning = _show(module, layer, call, (keys, values), visible, causal=mask is None and not past)
    apart = past and any(not store.heads_aligned for store in held.packed)
    if call.softcap or call.sinks is not None or apart:
        output = _in_blocks(call, keys, visible, call.query.shape[1], partial(_exact, keys, values))
    elif alone is not None:
        output = _row_by_row(module, call, keys, values, alone)
    elif not past and (mask is None or mask.dim() == 4):
        output = _sdpa(module, keys, values, call, mask)
    else:
        output = _in_blocks(call, keys, visible, 1, partial(_sdpa, module, keys, values))
    if learning:  # by now the device has all that it needs to go on
        _confirm(layer, held.logical - chunk)
    if layer.reading:
        _reread(layer, call, keys, visible)
        layer.finish_pending()
        return output
    tracked = layer.plan.tracker.active and layer.plan.ladder.bounded
    observed = _observe(layer, call, keys, visible, chunk) if tracked else None
    _observe_queries(layer, call, padding)
    if learning:
        layer.steps.replan(fresh=True)  # no graph of the codes before them
    del keys, values  # the layer alone holds them now, and drops them as it packs
    layer.finish_pending(padding, observed)
    return output


def _confirm(layer: TieredLayer, start: int) -> None:
    """Refuse a chunk from position ``start`` on that is not finite, and take back the whole pass. Raises ``NonFiniteError``."""
    try:
        layer.plan.finite.confirm(layer.index, *cast(tuple[Tensor, Tensor], layer.pending), start)
    except NonFiniteError as error:
        cache = None if layer.owner is None else layer.owner()
        if cache is None:
            raise
        raise cache.taken_back(layer.index, error) from None


# --- what quantizers and a policy are told of a prompt ---


def _show(
    module: torch.nn.Module,
    layer: TieredLayer,
    call: _Call,
    tokens: tuple[Tensor, Tensor],
    visible: Visible,
    causal: bool,
) -> bool:
    """Let quantizers learn, unless some of what they had to read back is encoded; whether there are any that do."""
    if layer.reading or layer.held.packed or not layer.plan.learners:
        return False
    seen_by = call.query, *tokens, call.scaling, call.softcap, call.sinks, visible, module
    sizes = layer.index, layer.plan.ladder.n_sink, layer.plan.ladder.recent_window
    prompt = PromptView(*seen_by, *sizes, layer.plan.turns(), causal)
    for quantizer in layer.plan.learners:
        quantizer.observe(prompt)
    return True


def _probabilities(
    call: _Call, keys: Tensor, visible: Visible, first: int, block: int, apart: bool = False
) -> Iterator[tuple[int, slice, Tensor, Tensor]]:
    """What queries from ``first`` on give to all tokens, a block of queries and a KV head at a time.

    Logits of all heads at once would outweigh the keys. Yields the block's first query, the head, its mask, and
    probabilities ``[B, 1, block, T]``; ``[B, G, block, T]`` if its ``G`` query heads are kept ``apart``.
    """
    (heads, total), groups = (keys.shape[1], call.query.shape[2]), call.query.shape[1] // keys.shape[1]
    for start in range(first, total, block):
        part = slice(start, min(start + block, total))
        seen = visible(part)
        for head in range(heads):
            ours, mine = slice(head, head + 1), slice(head * groups, (head + 1) * groups)
            saw = seen if seen.shape[1] == 1 else seen[:, ours]
            own = keys[:, ours].expand(-1, groups if apart else 1, -1, -1)  # [B, G or 1, T, D]
            sinks = None if call.sinks is None else call.sinks[mine]
            asked = call.query[:, mine, part], [FullSegment(own, own[..., :1], saw)], call.scaling, call.softcap, sinks
            yield start, ours, saw, cast(list[Tensor], decode_attention(*asked, probabilities=True).probabilities)[0]


def _observe(layer: TieredLayer, call: _Call, keys: Tensor, visible: Visible, chunk: int) -> dict[str, Tensor]:
    """Feed the tracker with the chunk's last queries; statistics of the chunk's own tokens are returned."""
    tracker, queries = layer.plan.tracker, call.query.shape[2]
    own = {n: keys.new_zeros((*keys.shape[:2], chunk), dtype=torch.float32) for n in tracker.statistics}
    held = [*layer.held.statistics(), own]
    sizes = [next(iter(statistics.values())).shape[2] for statistics in held]
    for statistics in held:
        tracker.age(statistics, queries)
    for _, head, saw, given in _probabilities(call, keys, visible, queries - tracker.observed(queries), _OBSERVED):
        shown = saw.expand(-1, -1, -1, keys.shape[2]).split(sizes, dim=3)
        for statistics, probabilities, view in zip(held, given.split(sizes, dim=3), shown, strict=True):
            tracker.observe({n: t[:, head] for n, t in statistics.items()}, probabilities, view)
    return own


def _reread(layer: TieredLayer, call: _Call, keys: Tensor, visible: Visible) -> None:
    """Feed the statistic "reread" of what is stored with a chunk that only reads; padded queries have no say."""
    held = layer.held.statistics()
    if not any("reread" in statistics for statistics in held):
        return
    queries, groups = call.query.shape[2], call.query.shape[1] // keys.shape[1]
    block = max(
        _OBSERVED, keys.shape[1] * keys.shape[3] // groups
    )  # whose logits take no more elements than the keys do
    sizes = [statistics["reread"].shape[2] for statistics in held]
    for start, head, saw, given in _probabilities(call, keys, visible, 0, block, apart=True):
        itself = saw[..., -queries:].diagonal(start, -2, -1)[..., None]
        most = (given[..., :-queries].float() * itself).amax(1, keepdim=True)
        for statistics, given_here in zip(held, most.split(sizes, dim=3), strict=True):
            layer.plan.tracker.observe_rereading({n: t[:, head] for n, t in statistics.items()}, given_here)


def _observe_queries(layer: TieredLayer, call: _Call, padding: Tensor | None) -> None:
    """Feed the layer's query statistics, if any are kept; ``padding``: leading columns of rows still empty."""
    held, tracker, count = layer.held, layer.plan.tracker, call.query.shape[2]
    if held.queries is None:
        return
    first, real = count - tracker.observed(count), None
    if padding is not None:
        dropped = torch.where(held.window.lengths == 0, padding, 0)
        real = sent(torch.arange(first, count) >= dropped[:, None], call.query.device)  # [B, Q]
    held.queries.observe(call.query[:, :, first:] * call.scaling, tracker.keeps(count), real)


# --- exact attention, and masks ---


def _in_blocks(
    call: _Call, key: Tensor, visible: Visible, heads: int, attend: Callable[[_Call, Tensor], Tensor]
) -> Tensor:
    """``attend`` to some queries and their mask at a time.

    At least 16, and so many that ``heads`` numbers a query and token take no more elements than the keys do.
    """
    block, queries = max(16, key.shape[1] * key.shape[3] // heads), call.query.shape[2]
    parts = [slice(start, min(start + block, queries)) for start in range(0, queries, block)]
    return torch.cat([attend(call._replace(query=call.query[:, :, part]), visible(part)) for part in parts], 2)


def _exact(key: Tensor, value: Tensor, call: _Call, mask: Tensor) -> Tensor:
    """Exact attention ``[B, H_q, Q, D_v]`` with soft cap and sinks."""
    segments: list[Segment] = [FullSegment(key, value, mask)]
    return decode_attention(call.query, segments, call.scaling, call.softcap, call.sinks).output


def _sdpa(module: torch.nn.Module, key: Tensor, value: Tensor, call: _Call, mask: Tensor | None) -> Tensor:
    """torch's exact attention ``[B, H_q, Q, D_v]``; causal where ``mask`` is ``None``."""
    output: Tensor = sdpa_attention_forward(module, call.query, key, value, mask, scaling=call.scaling)[0]
    return output.transpose(1, 2)


def _row_by_row(module: torch.nn.Module, call: _Call, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
    """As ``_sdpa``, each row without the ``padding[b]`` columns on its left, whose output is 0: no mask is needed then."""
    output = call.query.new_zeros((*call.query.shape[:3], value.shape[3]))
    for row, first in enumerate(padding.tolist()):
        if first < key.shape[2]:
            own = [t[row : row + 1, :, first:] for t in (call.query, key, value)]
            output[row : row + 1, :, first:] = _sdpa(module, own[1], own[2], call._replace(query=own[0]), None)
    return output


def as_bool(mask: Tensor | None) -> Tensor | None:
    """A boolean mask; an additive one forbids what it pushes below half of its dtype's range."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def rows_of(call: _Call, tokens: int, part: slice | Tensor = slice(None)) -> Tensor:
    """bool ``[B or 1, H or 1, len(part), tokens]``: what the queries ``part`` may see; causal where there is no mask."""
    mask, queries, device = call.mask, call.query.shape[2], call.query.device
    if mask is not None and mask.dim() == 4:
        return mask[:, :, part, :tokens]
    own = torch.arange(tokens - queries, tokens, device=device)[part]
    causal = (torch.arange(tokens, device=device) <= own[:, None])[None, None]
    return causal if mask is None else causal & mask[:, None, None, :tokens]


# --- masks as transformers asks for them ---

_take_rows: weakref.WeakValueDictionary[int, PreTrainedConfig] = weakref.WeakValueDictionary()
"""Configurations, by id, of models that pass a mask ``[B, T]`` on as it is: they do so for flash attention."""


_says_not_causal: weakref.WeakValueDictionary[int, PreTrainedConfig] = weakref.WeakValueDictionary()
"""Configurations, by id, of models whose attention calls itself not causal, so that no mask means another thing there."""


def take_rows(model: PreTrainedModel) -> None:
    """Masks of this ``model`` that hide padding alone may be ``[B, T]``, if it hands them on to attention unseen."""
    configs = {id(config): config for config in (model.config, model.config.get_text_config(decoder=True))}
    if any(getattr(m, "is_causal", True) is False for m in model.modules() if hasattr(m, "layer_idx")):
        _says_not_causal.update(configs)
    elif model._supports_flash_attn:
        _take_rows.update(configs)


def padding_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0, **given: Any
) -> Tensor | None:
    """The mask of a pass, as transformers asks for it; ``given``: what else its ``sdpa_mask`` takes.

    Returns:
        ``None`` for a prompt whose tokens see all that came before them; bool ``[B, T]`` where several queries see that but
        for padding; else what transformers makes for its own attention, ``[B, 1, Q, T]``.
    """
    rows: Tensor | None = given.get("attention_mask")
    config = given.get("config")
    given |= {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    given |= {"kv_offset": kv_offset}
    own = own_name(config)
    if own is not None and own != NAME:
        return cast(Tensor | None, ALL_MASK_ATTENTION_FUNCTIONS[own](**given))
    if id(config) in _says_not_causal and replaced_name(config) == "eager":  # whose masks are always shown
        given["allow_is_causal_skip"] = False
    plain = given.get("mask_function", causal_mask_function) is causal_mask_function
    plain = plain and given.get("allow_is_causal_skip", True) and _take_rows.get(id(config)) is config is not None
    plain = plain and isinstance(q_offset, int) and kv_offset == 0 and kv_length == q_offset + q_length
    if plain and q_length > 1 and not (torch.compiler.is_compiling() or recorded.on):
        if rows is None and q_offset:
            rows = torch.ones((batch_size, kv_length), dtype=torch.bool, device=given.get("device"))
        if rows is not None and rows.shape[1] == kv_length and (q_offset or not bool(rows.all())):
            return rows.bool()
    return cast(Tensor | None, sdpa_mask(**given))


def register() -> None:
    """Make ``attn_implementation="fade"`` known to transformers, masks included (without one padding is ignored)."""
    AttentionInterface.register(NAME, fade_attention)
    AttentionMaskInterface.register(NAME, padding_mask)


register()
