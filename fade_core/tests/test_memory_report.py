"""What the cache holds: the report is the sum over live tensors, nothing dense stays, and the peak is one layer's."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import feed, greedy, left_padded, tiny_gemma3
from tiny import fresh_seed, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache, reassign_tiers
from fade_core.cache.attention import fade_attention
from fade_core.cache.layer import Handle
from fade_core.support.memory import CachePeak, PeakTracker, live_bytes

SMALL: dict[str, Any] = {"n_sink": 2, "recent_window": 16, "tile": 16}
TOKENWISE: dict[str, Any] = {"kind": "uniform", "bits": 4, "axis": "token"}
CONFIGS: dict[str, dict[str, Any]] = {
    "packed": SMALL,
    "h2o": SMALL | {"policy": {"kind": "h2o", "budget": 0.5, "every": 3}},
    "ladder": SMALL
    | {
        "policy": {"kind": "ema", "every": 4},
        "keys": TOKENWISE,
        "ladder": [
            {"tier": "fp16", "capacity": 16},
            {"tier": "int4", "capacity": 32},
            {"tier": "int2", "capacity": 48},
        ],
    },
    "oldest": SMALL | {"policy": {"kind": "position", "budget": 70, "every": 7}},
    "stock": SMALL | {"attention": "stock"},
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(fresh_seed())


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {"llama": tiny_llama(layers=2), "gemma": tiny_gemma3(layers=3)}


def check(cache: TieredKVCache) -> None:
    held = live_bytes(cache)
    report = cache.memory_report()
    assert report.total == live_bytes(cache)
    if cache.attention == "fade":  # stock attention leaves packing to the next step, or to whoever asks
        assert held == report.total
    assert all(row.nbytes > 0 for row in report.rows)
    for field in ("layer", "tier", "kind"):
        assert sum(report.by(field).values()) == report.total
    assert cache.compressed_storage_bytes() == report.total
    assert cache.baseline_bytes() == report.baseline
    assert report.tokens == cache.get_seq_length()
    assert cache.compression_ratio() == (report.baseline / report.total if report.total else 1.0)
    plain = report.to_dict()
    assert json.loads(json.dumps(plain))["total"] == report.total
    assert set(plain["tiers"]) <= {*cache.tier_names(), "layer", "other"}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_report_is_the_sum_over_live_tensors_in_every_state(models: dict[str, Any], family: str, name: str) -> None:
    model = models[family]
    cache = create_tiered_cache(model, FadeConfig(**CONFIGS[name]))
    check(cache)
    ids, mask = left_padded((140, 101))
    logits = feed(model, ids, cache, mask)
    check(cache)
    for _ in range(4):
        logits = greedy(model, logits, cache, 5, mask)[1]
        mask = torch.cat([mask, mask.new_ones(2, 5)], dim=1)
        check(cache)
    more = torch.randint(1, 256, (2, 50))
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    feed(model, more, cache, mask)
    check(cache)
    reassign_tiers(cache)
    check(cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    check(cache)
    cache.batch_repeat_interleave(3)
    check(cache)
    cache.batch_select_indices(torch.tensor([4, 0]))
    check(cache)
    if family == "llama":
        cache.crop(-30)
        check(cache)
        cache.crop(-cache.get_seq_length())
        assert cache.memory_report().total == 0
        check(cache)
    cache.reset()
    cache.detach()
    check(cache)
    assert cache.memory_report().total <= 3 * 8  # transformers' sliding layers keep their window's length as a tensor


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_the_baseline_is_what_a_dynamic_cache_holds(models: dict[str, Any], family: str) -> None:
    model = models[family]
    ids = torch.randint(1, 256, (2, 150))
    exact, cache = DynamicCache(config=model.config), create_tiered_cache(model, FadeConfig(**SMALL))
    for found in (exact, cache):
        greedy(model, feed(model, ids, found), found, 3)
    assert cache.baseline_bytes() == live_bytes(exact)
    report = cache.memory_report()
    assert report.baseline16 <= report.baseline
    if family == "llama":
        assert report.baseline == 2 * report.baseline16  # the model is in float32


def test_evicting_frees_memory(models: dict[str, Any]) -> None:
    model = models["llama"]
    ids = torch.randint(1, 256, (1, 400))
    held = []
    for budget in (None, 200, 100):
        policy = {"kind": "h2o", "budget": budget} if budget else {"kind": "position"}
        cache = create_tiered_cache(model, FadeConfig(**SMALL, policy=policy))
        feed(model, ids, cache)
        held.append(cache.memory_report().total)
    assert held[0] > 1.2 * held[1]  # heads of 16 channels: the window and the statistics weigh a lot
    assert held[1] > 1.2 * held[2]


def handles() -> set[int]:
    """Handles that are alive."""
    return {id(thing) for thing in gc.get_objects() if type(thing) is Handle}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "stock"])
def test_nothing_dense_stays_after_a_step(models: dict[str, Any], name: str) -> None:
    model = models["llama"]
    gc.collect()
    of_others = handles()
    cache = create_tiered_cache(model, FadeConfig(**CONFIGS[name]))
    logits = feed(model, torch.randint(1, 256, (2, 300)), cache)
    for _ in range(20):
        logits = greedy(model, logits, cache, 1)[1]
        for layer in cache.tiered:
            for kind, tensor in layer.tensors().items():
                if tensor.dim() == 4 and tensor.is_floating_point():
                    tokens = tensor.shape[2]
                    limit = 2 + 16 + 16 if kind in ("fp16/keys", "fp16/values") else 16  # window; a tile of a pool
                    assert tokens <= limit, kind
    assert handles() <= of_others  # none waits for the garbage collector


# --- decoding ---


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Name and output sizes of every operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[tuple[str, torch.Size]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.seen.append((func.overloadpacket.__name__, out.shape))
        return out


@pytest.mark.parametrize("name", ["packed", "h2o", "ladder", "oldest"])
def test_no_step_concatenates_the_cache(models: dict[str, Any], name: str) -> None:
    """20 steps, so that some of them encode, demote, evict and rank."""
    model, context = models["llama"], 500
    cache = create_tiered_cache(model, FadeConfig(**CONFIGS[name]))
    logits = feed(model, torch.randint(1, 256, (2, context)), cache)
    with Operations() as operations:
        greedy(model, logits, cache, 20)
    stored = min(
        int(layer.held.window.lengths[0] + sum(s.lengths[0, 0] for s in layer.held.stores)) for layer in cache.tiered
    )
    joined = [shape for operation, shape in operations.seen if operation in ("cat", "stack")]
    assert joined  # rotary embeddings are concatenated, at least
    dense = [shape for shape in joined if len(shape) == 4 and max(shape) >= stored // 2]
    assert not dense, dense
    if name == "packed":  # no ranking: nothing as long as the cache is joined at all
        assert max(max(shape) for shape in joined) < context


def decode_peak(layers: int, context: int) -> int:
    model = tiny_llama(layers=layers)
    cache = create_tiered_cache(model, FadeConfig(**SMALL))
    logits = feed(model, torch.randint(1, 256, (1, context)), cache)
    logits = greedy(model, logits, cache, 3)[1]  # none of these or the next step fills a tile
    with PeakTracker() as tracker:
        greedy(model, logits, cache, 1)
    return tracker.peak


def test_a_step_needs_room_for_one_layer_however_many_there_are() -> None:
    context = 1000
    assert decode_peak(6, context) <= decode_peak(2, context) * 1.1
    dense = 2 * 2 * context * 16 * 4  # keys and values of a layer
    assert decode_peak(2, context) < 2 * dense


def test_steps_that_fill_no_tile_keep_no_memory(models: dict[str, Any]) -> None:
    model = models["llama"]
    cache = create_tiered_cache(model, FadeConfig(**SMALL))
    logits = feed(model, torch.randint(1, 256, (1, 2 + 16 + 17 * 16)), cache)  # sinks and window, and whole tiles
    logits = greedy(model, logits, cache, 1)[1]
    held = live_bytes(cache)
    for _ in range(14):
        logits = greedy(model, logits, cache, 1)[1]
        assert live_bytes(cache) == held
    greedy(model, logits, cache, 1)
    assert held < live_bytes(cache) < held * 1.1


# --- prefill ---

LAYERS, HEADS, DIM = 5, 2, 64


@pytest.fixture(scope="module")
def wide() -> Any:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=HEADS * DIM,
        intermediate_size=16,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
    )
    return LlamaForCausalLM(config).eval()


def causal(queries: int, tokens: int) -> Tensor | None:
    if queries == tokens:
        return None
    return torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]


@torch.no_grad()
def attention_alone(model: Any, queries: int, tokens: int, dtype: torch.dtype) -> int:
    """Peak of exact attention beyond its keys and values: what any cache needs."""
    module = model.model.layers[0].self_attn
    key, value = torch.randn(2, 1, HEADS, tokens, DIM).to(dtype)
    with PeakTracker() as tracker:
        query = torch.randn(1, HEADS, queries, DIM, dtype=dtype)
        sdpa_attention_forward(module, query, key, value, causal(queries, tokens), scaling=DIM**-0.5)
    return tracker.peak


@torch.no_grad()
def prefill_peak(model: Any, cache: TieredKVCache, tokens: int, chunk: int, dtype: torch.dtype) -> int:
    """Peak while every layer takes its share of a prompt, chunk by chunk, letting go of tensors as a model does."""
    module = model.model.layers[0].self_attn
    with PeakTracker() as tracker:
        for end in range(chunk, tokens + 1, chunk):
            mask = causal(chunk, end)
            for layer in range(LAYERS):
                query, key, value = (torch.randn(1, HEADS, chunk, DIM, dtype=dtype) for _ in range(3))
                key, value = cache.update(key, value, layer)
                output, _ = fade_attention(module, query, key, value, mask)
                del query, key, value, output
            del mask
    return tracker.peak


PRESETS: dict[str, Callable[[], FadeConfig]] = {
    "safe": FadeConfig.safe,
    "balanced": FadeConfig.balanced,
    "aggressive": FadeConfig.aggressive,
    "ladder": lambda: FadeConfig(
        policy={"kind": "h2o"},
        keys=TOKENWISE,
        ladder=[{"tier": "int4", "capacity": 0.5}, {"tier": "int2", "capacity": "rest"}],
    ),
}


@pytest.mark.parametrize(
    ("name", "tokens", "chunk", "dtype"),
    [
        ("safe", 2048, 2048, torch.bfloat16),
        ("safe", 2048, 2048, torch.float32),
        ("balanced", 2048, 2048, torch.bfloat16),
        ("aggressive", 2048, 2048, torch.bfloat16),
        ("ladder", 2048, 2048, torch.bfloat16),
        pytest.param("safe", 1024, 256, torch.float32, marks=pytest.mark.slow),
        pytest.param("aggressive", 1024, 256, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_the_peak_of_a_prefill_is_the_compressed_size_and_two_layers(
    wide: Any, name: str, tokens: int, chunk: int, dtype: torch.dtype
) -> None:
    cache = create_tiered_cache(wide, PRESETS[name]())
    peak = prefill_peak(wide, cache, tokens, chunk, dtype)
    final = cache.memory_report().total
    layer = 2 * HEADS * tokens * DIM * dtype.itemsize
    assert final < 0.5 * LAYERS * layer
    excess = (peak - final - attention_alone(wide, chunk, tokens, dtype)) / layer
    print(f"{name} {dtype} {tokens} by {chunk}: {excess:.2f} layers above the compressed size and attention itself")
    assert excess <= 2
    cache.detach()


def test_after_each_update_of_generate_at_most_one_layer_is_dense(models: dict[str, Any]) -> None:
    model = tiny_llama(layers=6)
    ids = torch.randint(1, 256, (1, 600))
    cache = create_tiered_cache(model, FadeConfig(**SMALL))
    with CachePeak(cache) as tracker:
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    layer = 2 * 2 * 600 * 16 * 4
    assert tracker.peak <= cache.memory_report().total + layer
