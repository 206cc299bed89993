"""The manual loop: track attention, choose tiers, apply them. Inside ``generate`` all this happens by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fade_core.cache.layer import TieredLayer
from fade_core.cache.tiered_cache import TieredKVCache
from fade_core.errors import InputError
from fade_core.eviction.assignment import assign
from fade_core.eviction.attention_tracker import AttentionTracker


def forward_with_tracking(
    model: Any,
    input_ids: Tensor,
    past_key_values: TieredKVCache,
    tracker: AttentionTracker | None = None,
    attention_mask: Tensor | None = None,
) -> Any:
    """One forward pass of ``input_ids`` ``[B, Q]`` whose attention the cache's tracker observes; no eager attention needed.

    Args:
        model: the model the cache was created for.
        input_ids: new tokens.
        past_key_values: the cache.
        tracker: the cache's own tracker (``cache.tracker``), accepted so that loops can name it.
        attention_mask: int ``[B, past + Q]`` or ``None``.

    Raises:
        InputError: if ``tracker`` is not the cache's: statistics live beside the tokens, in one place.
    """
    if tracker is not None and tracker is not past_key_values.tracker:
        raise InputError("statistics live in the cache, beside the tokens; pass tracker=cache.tracker, or leave it out")
    with torch.no_grad():
        return model(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, use_cache=True
        )


def reassign_tiers(
    cache: TieredKVCache, tracker: AttentionTracker | None = None, num_layers: int | None = None
) -> None:
    """Re-score every token and re-fill the ladder of each layer now (of the first ``num_layers`` if given).

    Raises:
        InputError: if ``tracker`` is not the cache's.
    """
    if tracker is not None and tracker is not cache.tracker:
        raise InputError("statistics live in the cache, beside the tokens; pass tracker=cache.tracker, or leave it out")
    cache.settle()
    for layer in cache.tiered:
        if num_layers is None or layer.index < num_layers:
            layer.rank()


def apply_tier_assignment(cache: TieredKVCache, layer_idx: int, tiers: Tensor) -> None:
    """Move one layer's tokens to chosen tiers, the same for every row and head.

    Args:
        cache: the cache.
        layer_idx: layer index.
        tiers: integers ``[T]`` over logical positions: an index into ``cache.tier_names()``, or -1 to evict.

    Raises:
        InputError: wrong shape, unknown tier, or a token that would have to move up; nothing has changed then.
    """
    layer = _layer(cache, layer_idx)
    if tiers.dim() != 1:
        raise InputError(
            f"tiers have shape {tuple(tiers.shape)}; [T] is needed (apply_tier_assignment_per_sequence takes rows)"
        )
    assign_layer(layer, _clamped(layer, tiers.long().expand(*layer.held.tier_map().shape[:2], -1)))


def apply_tier_assignment_per_sequence(cache: TieredKVCache, layer_idx: int, tiers: Tensor) -> None:
    """As ``apply_tier_assignment`` with ``tiers`` ``[B, T]`` or ``[B, H_kv, T]``: every row (and head) on its own."""
    layer = _layer(cache, layer_idx)
    if tiers.dim() not in (2, 3):
        raise InputError(f"tiers have shape {tuple(tiers.shape)}; [B, T] or [B, H_kv, T] is needed")
    heads = layer.held.tier_map().shape[1]
    wanted = tiers.long() if tiers.dim() == 3 else tiers.long()[:, None].expand(-1, heads, -1)
    assign_layer(layer, _clamped(layer, wanted))


def assign_layer(layer: TieredLayer, tiers: Tensor) -> None:
    """Move the tokens of a layer to the tiers that somebody else chose; sinks and window are free to leave.

    Args:
        layer: the layer.
        tiers: int64 ``[B, H_kv, logical]``: wanted tier of each position: 0 full precision, ``i`` the ladder's
            ``i``-th packed tier, -1 evicted. Tokens only move down.

    Raises:
        InputError: wrong shape, an unknown tier, or a token that would have to move up.
    """
    layer.settle()
    with layer.moving() as moved:
        moved |= dict(zip(("encode", "demote", "evict"), assign(layer.held, tiers), strict=True))
        moved["reassign"] = sum(moved.values())
        layer.held.look_for_gaps()


def _clamped(layer: TieredLayer, wanted: Tensor) -> Tensor:
    """``wanted`` with tokens that are gone already left gone (padding, evicted)."""
    now = layer.held.tier_map()
    if wanted.shape != now.shape:
        return wanted
    return torch.where(now < 0, torch.full_like(now, -1), wanted.to(now.device))


def _layer(cache: TieredKVCache, layer_idx: int) -> TieredLayer:
    known = {layer.index: layer for layer in cache.tiered}
    if layer_idx not in known:
        raise InputError(f"layer {layer_idx} is not tiered; tiered layers: {sorted(known)}")
    known[layer_idx].settle()
    return known[layer_idx]
