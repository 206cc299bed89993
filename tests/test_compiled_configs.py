"""Every kind of configuration compiles: one graph for all steps, whatever is encoded, ranked and evicted between them.

``FADE_STEPS=1000`` decodes that many tokens a configuration; without it a few rankings' worth.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compiled import _fresh_compiler  # noqa: F401 (around every test)
from tinymodels import VOCABULARY, prompt, tiny
from torch import Tensor
from transformers import CompileConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_policy_learned import FEATURES, train_policy
from fade_quant_rotated.calibrate import calibrate
from fade_quant_rotated.training import train_codebooks

pytestmark = pytest.mark.slow  # each compiles

PROMPT = 176
STEPS = int(os.environ.get("FADE_STEPS", "32"))
SHORT = {"n_sink": 4, "recent_window": 32, "tile": 16}
TWO_TIERS = [{"tier": "int4", "capacity": 1 / 3}, {"tier": "int2", "capacity": "rest"}]
TOKENS = {"kind": "uniform", "axis": "token"}


@functools.cache
def model(layers: int = 1) -> PreTrainedModel:
    return tiny("llama", 0, num_hidden_layers=layers, head_dim=32)


@functools.cache
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="fade-"))


def side(kind: str, **fields: Any) -> dict[str, Any]:
    """One quantizer for keys and values."""
    quantizer = {"kind": kind} | fields
    return SHORT | {"keys": quantizer, "values": quantizer}


@functools.cache
def calibrated() -> FadeConfig:
    path = folder() / "calibration.safetensors"
    texts = [torch.randint(VOCABULARY, (300,), generator=torch.Generator().manual_seed(i)) for i in range(2)]
    calibrate(model(), texts, bits=5.0).save(path)
    return FadeConfig(**side("calibrated", file=str(path), side_bits=6.0))


@functools.cache
def learned() -> FadeConfig:
    path = folder() / "policy.safetensors"
    features = torch.rand(200, len(FEATURES), generator=torch.Generator().manual_seed(0))
    train_policy(features, features[:, 0], epochs=2).policy.save(path)
    return FadeConfig(
        **SHORT, keys=TOKENS, policy={"kind": "learned", "checkpoint": str(path), "budget": 96, "every": 8}
    )


CONFIGS: dict[str, Callable[[], FadeConfig]] = {
    "safe": FadeConfig.safe,
    "balanced": FadeConfig.balanced,
    "aggressive": FadeConfig.aggressive,
    "two tiers": lambda: FadeConfig(**SHORT, ladder=TWO_TIERS, policy={"kind": "h2o", "budget": 0.75, "every": 8}),
    "bytes": lambda: FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "h2o", "budget": "130 KiB", "every": 8}),
    "ragged heads": lambda: FadeConfig(
        **SHORT, policy={"kind": "adakv", "budget": 0.5, "every": 8, "base": {"kind": "snapkv", "window": 8}}
    ),
    "query moments": lambda: FadeConfig(
        **SHORT, keys=TOKENS, policy={"kind": "expected_attention", "budget": 0.5, "every": 8}
    ),
    "contiguous": lambda: FadeConfig(
        **SHORT, keys=TOKENS, reposition="contiguous", policy={"kind": "h2o", "budget": 0.5, "every": 8}
    ),
    "self-calibrated": lambda: FadeConfig(**side("self-calibrated", bits=6.0)),
    "calibrated": calibrated,
    "pq": lambda: FadeConfig(**side("pq", num_centroids=16)),
    "learned": learned,
}
EACH = pytest.mark.parametrize("name", CONFIGS)


@functools.cache
def codebooks() -> dict[str, Tensor]:
    texts = [torch.randint(VOCABULARY, (300,), generator=torch.Generator().manual_seed(7))]
    found = train_codebooks(model(), texts, num_centroids=16, seed=0)
    return {f"{key}.centroids": book.centroids for key, book in found.items()}


def cache_of(name: str, network: PreTrainedModel, max_cache_len: int | None) -> TieredKVCache:
    cache = create_tiered_cache(network, CONFIGS[name](), max_cache_len)
    if name == "pq":
        cache.set_codebooks(codebooks())
    return cache


class Watch(LogitsProcessor):
    """Counts how often a buffer of the cache got another size."""

    def __init__(self, cache: TieredKVCache) -> None:
        self.cache, self.sizes, self.growths = cache, list[int](), 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        sizes = [store.pool.capacity for layer in self.cache.tiered for store in layer.held.stores]
        sizes += [layer.held.window.keys.shape[2] for layer in self.cache.tiered]  # type: ignore[union-attr]
        self.growths += bool(self.sizes) and sizes != self.sizes
        self.sizes = sizes
        return scores


def generate(
    network: PreTrainedModel, cache: TieredKVCache, graphs: list[Any] | None, watch: Watch | None = None
) -> Tensor:
    """Greedy tokens of two rows, compiled if there is a list to put the graphs into."""
    ids = prompt(1, PROMPT, 2)
    options: dict[str, Any] = {"disable_compile": True}
    if graphs is not None:

        def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
            graphs.append(graph)
            return graph

        options = {"compile_config": CompileConfig(fullgraph=True, dynamic=None, backend=backend, mode=None)}
        options["compile_config"]._compile_all_devices = True
    found: Tensor = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        do_sample=False,
        max_new_tokens=STEPS,
        min_new_tokens=STEPS,
        logits_processor=LogitsProcessorList([] if watch is None else [watch]),
        **options,
    )
    return found


@EACH
def test_nothing_is_refused_and_one_graph_serves_all_steps(name: str) -> None:
    """The tokens are those of a cache that grows and is not compiled."""
    graphs: list[Any] = []
    with cache_of(name, model(), PROMPT + STEPS) as cache:
        assert cache.compile_refusal == ""
        cache.enable_compile()
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = generate(model(), cache, graphs)
        assert len(graphs) == 1
        levels = [layer.held.tier_map() for layer in cache.tiered]
    with cache_of(name, model(), None) as cache:
        assert torch.equal(generate(model(), cache, None), found)
        assert all(torch.equal(layer.held.tier_map(), level) for layer, level in zip(cache.tiered, levels, strict=True))


@pytest.mark.parametrize(
    ("name", "layers"), [("safe", 1), ("aggressive", 1), ("two tiers", 2), ("ragged heads", 1), ("contiguous", 1)]
)
def test_without_max_cache_len_there_is_at_most_one_graph_more_at_each_growth(name: str, layers: int) -> None:
    """In both layers at once, where there are two: tiers of several sizes have the most to grow."""
    graphs: list[Any] = []
    with cache_of(name, model(layers), None) as cache:
        cache.enable_compile()
        watch = Watch(cache)
        found = generate(model(layers), cache, graphs, watch)
        assert 1 <= len(graphs) <= 1 + watch.growths
    with cache_of(name, model(layers), None) as cache:
        assert torch.equal(generate(model(layers), cache, None), found)


@pytest.mark.real_model
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in ("calibrated", "pq")] + ["calibrated"])
def test_nothing_is_refused_on_the_real_model(name: str, smollm2: tuple[Any, Any]) -> None:
    network, _ = smollm2
    config = FadeConfig(**side("calibrated", file="smollm2", bits=2.1)) if name == "calibrated" else CONFIGS[name]()
    if name == "bytes":
        config = config.with_overrides(policy={"kind": "h2o", "budget": "8 MiB", "every": 8})  # thirty layers
    with create_tiered_cache(network, config, max_cache_len=2048) as cache:
        assert cache.compile_refusal == ""
