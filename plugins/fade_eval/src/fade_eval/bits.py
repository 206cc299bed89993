"""Bits that a packed element really takes, metadata counted."""

from __future__ import annotations

import math
from typing import Any

import torch

from fade_core.cache.named_caches import opened
from fade_core.models.loading import exact_cache
from fade_core.support.memory import live_bytes
from fade_eval.decode import prefill


def packed_bits(cache: Any, model: Any, rows: int) -> float:
    """Average bits of an element that is not in full precision, over layers, keys and values; NaN if there is none.

    For a ``TieredKVCache``, what its quantizers say of the tokens that each tier holds. For any other cache, its bytes
    less those of ``layer.keys`` and ``layer.values`` (the residual of transformers' QuantizedCache), divided by the
    elements that are not there.

    Args:
        cache: that has seen tokens.
        model: whose cache it is.
        rows: texts that it holds side by side.
    """
    return _tiered_bits(cache) if hasattr(cache, "tiered") else _other_bits(cache, model, rows)


def _tiered_bits(cache: Any) -> float:
    bits = tokens = 0.0
    cache.settle()
    for layer in cache.tiered:
        counts = torch.bincount(
            layer.held.tier_map().flatten() + 1, minlength=2 + len(layer.plan.ladder.tiers)
        ).tolist()
        for tier, count in zip(layer.plan.ladder.tiers, counts[2:], strict=True):
            bits += count * (tier.keys.bits_per_element + tier.values.bits_per_element) / 2
            tokens += count
    return bits / tokens if tokens else math.nan


def _other_bits(cache: Any, model: Any, rows: int) -> float:
    full = [tensor for layer in cache.layers for tensor in _full(layer)]
    elements = elements_of_token(model) * rows * cache.get_seq_length() - sum(tensor.numel() for tensor in full)
    held = live_bytes(cache, exclude=model) - live_bytes(full)
    return held * 8 / elements if elements > 0 else math.nan


def _full(layer: Any) -> list[torch.Tensor]:
    sides = (getattr(layer, "keys", None), getattr(layer, "values", None))
    return [side for side in sides if isinstance(side, torch.Tensor)]


def elements_of_token(model: Any) -> int:
    """Keys and values that one token brings, over all layers (asked of the exact cache after one token)."""
    ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    with opened(exact_cache, model) as cache:
        prefill(model, ids, cache)
        return sum(tensor.numel() for layer in cache.layers for tensor in _full(layer))
