"""Every mode of ``generate`` gives the tokens of a dense masked reference, compressed or not."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from modes import MODES, Result, tiny_task
from reference import DENSE, DenseLayer, Recording, attention, dense_cache, replay_cache
from tinymodels import by_turns, fresh_seed, tiny
from transformers import DynamicCache, PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.cache.layer import TieredLayer

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"num_key_value_heads": 1},
    "gemma3_text": {
        "num_hidden_layers": 3,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "attn_logit_softcapping": 20.0,
        "query_pre_attn_scalar": 16,
    },
}
SHORT = {"n_sink": 4, "recent_window": 16, "tile": 16}
EXACT = FadeConfig(**SHORT, ladder=[{"tier": "fp16"}])
PACKED = {
    "channel_keys": FadeConfig(
        **SHORT, keys={"kind": "uniform", "axis": "channel"}, values={"kind": "uniform", "bits": 2, "group": 8}
    ),
    "token_keys": FadeConfig(**SHORT, keys={"kind": "uniform", "bits": 3, "axis": "token"}),
}
LADDERS = {
    "h2o": FadeConfig(
        **SHORT,
        keys={"kind": "uniform", "axis": "token"},
        ladder=[
            {"tier": "fp16", "capacity": 32},
            {"tier": "int4", "capacity": 0.4},
            {"tier": "int2", "capacity": "rest"},
        ],
        policy={"kind": "h2o", "budget": 0.7, "every": 8},
    ),
    "ema": FadeConfig(
        **SHORT, keys={"kind": "uniform", "axis": "channel"}, policy={"kind": "ema", "budget": 0.5, "every": 5}
    ),
    "position": FadeConfig(
        **SHORT,
        ladder=[{"tier": "int4", "capacity": 32}, {"tier": "int2", "capacity": 32}],
        policy={"kind": "position", "every": 8},
    ),
}
LENGTH = 300
TIERS = {"h2o": ("fp16", "fp16", "int4", "int2"), "ema": ("fp16", "int4"), "position": ("fp16", "int4", "int2")}


def each_mode(configs: Sequence[str]) -> list[tuple[str, str, str, int | None]]:
    """Family, configuration, mode and ``max_cache_len``: each mode meets all configurations, and each of them both lengths."""
    return [
        (family, configs[(first + i) % len(configs)], mode, (None, LENGTH)[(first + i // 2) % 2])
        for first, family in enumerate(FAMILIES)
        for i, mode in enumerate(MODES)
    ]


@functools.cache
def model_of(family: str) -> PreTrainedModel:
    return tiny(family, fresh_seed(), **{"num_hidden_layers": 2} | FAMILIES[family])


def same(found: Result, wanted: Result) -> None:
    """Tokens identical, logits to within a millionth of their spread."""
    for ours, theirs in zip(found.tokens, wanted.tokens, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-6 * float(theirs.std()))


@pytest.mark.parametrize(("family", "mode", "max_cache_len"), by_turns(LENGTH, FAMILIES, MODES))
def test_full_precision_ladder_is_the_dynamic_cache(family: str, mode: str, max_cache_len: int | None) -> None:
    model = model_of(family)
    task = tiny_task(model, fresh_seed())
    wanted = MODES[mode](task, lambda padding: DynamicCache(config=model.config))
    with create_tiered_cache(model, EXACT, max_cache_len) as cache:
        same(MODES[mode](task, lambda padding: cache), wanted)
    assert encoded(cache) > 0


@pytest.mark.parametrize(("family", "packed", "mode", "max_cache_len"), each_mode([*PACKED]))
def test_compressed_is_the_dense_reference(family: str, packed: str, mode: str, max_cache_len: int | None) -> None:
    model, config = model_of(family), PACKED[packed]
    task = tiny_task(model, fresh_seed())
    with create_tiered_cache(model, config, max_cache_len) as cache:
        found = MODES[mode](task, lambda padding: cache)
        cache.settle()
    with attention(model, DENSE):
        wanted = MODES[mode](task, lambda padding: dense_cache(model, config, padding))
    same(found, wanted)
    quantised = [layer.quantised for layer in wanted.cache.layers if isinstance(layer, DenseLayer)]
    assert quantised == [int(layer.held.stores[0].lengths[0, 0]) for layer in cache.tiered]
    assert encoded(cache) > 0


@pytest.mark.parametrize(("family", "ladder", "mode", "max_cache_len"), each_mode([*LADDERS]))
def test_demoted_and_evicted_is_the_dense_reference(
    family: str, ladder: str, mode: str, max_cache_len: int | None
) -> None:
    model = model_of(family)
    task = tiny_task(model, fresh_seed())
    with create_tiered_cache(model, LADDERS[ladder], max_cache_len) as cache:
        recording = Recording(cache)
        found = MODES[mode](task, lambda padding: cache)
        cache.settle()
    with attention(model, DENSE):
        wanted = MODES[mode](task, lambda padding: replay_cache(model, recording, TIERS[ladder]))
    same(found, wanted)
    assert encoded(cache) > 0
    assert all(int((layer.held.tier_map() < 0).sum()) > evicted_by_padding(layer) for layer in cache.tiered)


def evicted_by_padding(layer: TieredLayer) -> int:
    return int(layer.held.padding.sum()) * layer.held.tier_map().shape[1]


def encoded(cache: TieredKVCache) -> int:
    """Fewest tokens that a row and head of a tiered layer holds in its tiers."""
    return min(int(sum(store.lengths for store in layer.held.stores).min()) for layer in cache.tiered)
