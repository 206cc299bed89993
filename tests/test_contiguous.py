"""``reposition = "contiguous"``: survivors of an eviction are read side by side, and nothing that is stored changes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from reference import stored
from test_ranking_together import CONTIGUOUS, keep_alike
from tinymodels import by_turns, fresh_seed, left_padded, prompt, tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache, hookimpl
from fade_core.cache.attention import fade_attention
from fade_core.cache.layer import TieredLayer
from fade_core.cache.manual import apply_tier_assignment_per_sequence, assign_layer
from fade_core.errors import CheckpointError, ConfigError, UnsupportedModelError
from fade_core.interfaces import Event, Kernel, TelemetrySink
from fade_core.ops.reference import FullSegment, PackedSegment, TorchDecodeAttention
from fade_core.ops.step import segments_of
from fade_core.plugins import Registry, use_registry
from fade_core.support.memory import live_bytes, storage_bytes
from fade_core.testing import check_rope

SINKS, WINDOW, TILE = 3, 16, 16
LENGTH = 1000
BOTH = pytest.mark.parametrize("max_cache_len", [None, LENGTH])
LONG = 120

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "qwen3 yarn": (
        "qwen3",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}, "max_position_embeddings": 512},
    ),
    "gemma3, full layer": ("gemma3_text", {"layer_types": ["full_attention"]}),
    "phi, partial": ("phi", {"num_key_value_heads": 4}),
    "glm, adjacent pairs": ("glm", {}),
}


ONE_LAYER = {"num_hidden_layers": 1, "initializer_range": 0.15}
"""Logits are a function of layer 0's attention; weights small enough for it to be as sharp as in a trained model."""


def contiguous(**fields: Any) -> FadeConfig:
    return FadeConfig(**{"n_sink": SINKS, "recent_window": WINDOW, "tile": TILE, "reposition": "contiguous"} | fields)


EXACT = [{"tier": "fp16"}]
TOKENS = {"keys": {"kind": "uniform", "axis": "token"}}
TILES = {"keys": {"kind": "uniform", "axis": "channel"}}


class Events(TelemetrySink):
    def __init__(self) -> None:
        self.seen: list[Event] = []

    def emit(self, event: Event) -> None:
        self.seen.append(event)

    def fallbacks(self) -> list[str]:
        return [str(event.detail["reason"]) for event in self.seen if event.kind == "fallback"]


@torch.no_grad()
def read(model: PreTrainedModel, cache: Any, ids: Tensor, *widths: int) -> Tensor:
    """Logits of all of ``ids``, fed in passes of ``widths`` tokens (the last repeats)."""
    found, start, left = [], 0, list(widths)
    while start < ids.shape[1]:
        width = left.pop(0) if len(left) > 1 else left[0]
        found.append(model(input_ids=ids[:, start : start + width], past_key_values=cache, use_cache=True).logits)
        start += width
    return torch.cat(found, 1)


def evict(cache: TieredKVCache, share: float, layer: int = 0) -> Tensor:
    """Evict packed tokens of every row and head at random; positions that stay, bool ``[B, H_kv, T]``."""
    tiers = cache.layers[layer].held.tier_map()
    gone = (torch.rand(tiers.shape) < share) & (tiers > 0)
    apply_tier_assignment_per_sequence(cache, layer, torch.where(gone, -1, tiers))
    return cache.layers[layer].held.tier_map() >= 0


def evict_alike(cache: TieredKVCache, share: float) -> Tensor:
    """As ``evict``, the same tokens in every head of the one row; their positions ``[K]``."""
    tiers = cache.layers[0].held.tier_map()
    gone = (torch.rand(tiers.shape[-1]) < share) & (tiers > 0)
    apply_tier_assignment_per_sequence(cache, 0, torch.where(gone, -1, tiers))
    return (cache.layers[0].held.tier_map()[0, 0] >= 0).nonzero().flatten()


# --- against a run from scratch --------------------------------------------------------------------------------------


def from_scratch(model: PreTrainedModel, past: Tensor, new: Tensor) -> Tensor:
    """Logits of ``new`` after ``past`` alone, through transformers' own cache."""
    return read(model, DynamicCache(config=model.config), torch.cat([past, new], 1), 10**6)[:, past.shape[1] :]


def compared(model: PreTrainedModel, mode: str, max_cache_len: int | None = None) -> float:
    """Largest difference of one layer's logits from a run that saw only the survivors: steps, wide steps and a chunk."""
    ids = prompt(fresh_seed(), LONG + 70)
    new = ids[:, LONG:]
    with create_tiered_cache(model, contiguous(ladder=EXACT, reposition=mode), max_cache_len) as cache:
        read(model, cache, ids[:, :LONG], LONG)
        kept = evict_alike(cache, 0.5)
        assert len(kept) < LONG - 20
        found = read(model, cache, new, 1, 1, 7, 40, 1)
    return float((found - from_scratch(model, ids[:, kept], new)).abs().max())


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_survivors_are_read_as_by_a_run_that_saw_only_them(family: str, max_cache_len: int | None) -> None:
    model_type, fields = FAMILIES[family]
    model = tiny(model_type, fresh_seed(), **ONE_LAYER, **fields)
    assert compared(model, "contiguous", max_cache_len) <= 1e-4
    if max_cache_len is None:
        assert compared(model, "keep") > 1e-2


@BOTH
def test_without_rotation_they_are_read_exactly_so(max_cache_len: int | None) -> None:
    model = tiny("smollm3", fresh_seed(), num_hidden_layers=1, no_rope_layers=[0])
    for mode in ("contiguous", "keep"):
        assert compared(model, mode, max_cache_len) <= 1e-12


@BOTH
def test_sinks_and_window_of_a_long_stream_are_read_as_a_short_text(max_cache_len: int | None) -> None:
    """StreamingLLM, chunk by chunk: what is left is a text of sinks and newest tokens, read from scratch."""
    model = tiny("llama", fresh_seed(), **ONE_LAYER)
    ids = prompt(fresh_seed(), 800)
    policy = {"kind": "position", "budget": 64, "every": 1}
    with create_tiered_cache(model, contiguous(ladder=EXACT, policy=policy), max_cache_len) as cache:
        for start, width in ((0, 300), (300, 50), (350, 350), (700, 1), (701, 9), (710, 40)):
            cache.settle()
            kept = (cache.layers[0].held.tier_map()[0, 0] >= 0).nonzero().flatten() if start else torch.zeros(0).long()
            assert len(kept) <= 64 + TILE
            found = read(model, cache, ids[:, start : start + width], width)
            wanted = from_scratch(model, ids[:, kept], ids[:, start : start + width])
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


# --- against a dense reference over what is stored -------------------------------------------------------------------


def turned(x: Tensor, by: Tensor, theta: float = 10_000.0) -> Tensor:
    """``x [..., D]`` with pairs ``(i, i + D/2)`` turned on by ``by [...]`` positions, in float64."""
    half = x.shape[-1] // 2
    angle = by[..., None].double() * theta ** (-torch.arange(half).double() / half)
    pairs = torch.complex(x[..., :half].double(), x[..., half:].double()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pairs.real, pairs.imag], -1)


def dense(layer: TieredLayer, query: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of the newest tokens' ``query [B, H_q, Q, D]`` over all that is stored, ``[B, Q, H_q, D]``.

    Row by row and head by head: survivors stand side by side and end at the newest position.
    """
    held = stored(layer)
    batch, heads, logical, dim = held.keys.shape
    groups, queries = query.shape[1] // heads, query.shape[2]
    out = torch.zeros(batch, queries, query.shape[1], dim, dtype=torch.float64)
    for row in range(batch):
        for head in range(heads):
            at = (held.tier[row, head] >= 0).nonzero().flatten()
            virtual = torch.arange(logical - len(at), logical)
            keys = turned(held.keys[row, head, at], virtual - at)
            for q in range(queries):
                seen = at <= logical - queries + q
                if mask is not None:
                    seen &= mask[row, 0, q, at]
                for mine in range(head * groups, (head + 1) * groups):
                    logits = keys[seen] @ query[row, mine, q].double() * dim**-0.5
                    out[row, q, mine] = logits.softmax(0) @ held.values[row, head, at[seen]].double()
    return out


def filled(
    model: PreTrainedModel,
    config: FadeConfig,
    ids: Tensor,
    mask: Tensor | None = None,
    max_cache_len: int | None = None,
) -> TieredKVCache:
    """A detached cache with a prompt in it."""
    with create_tiered_cache(model, config, max_cache_len) as cache, torch.no_grad():
        model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    cache.settle()
    return cache


@pytest.mark.parametrize(
    ("queries", "quantizer", "dtype", "max_cache_len"),
    by_turns(LENGTH, [1, 5, 33], ["exact", "tokens", "kivi"], [torch.float64, torch.float32]),
)
def test_packed_keys_are_decoded_and_turned(
    queries: int, quantizer: str, dtype: torch.dtype, max_cache_len: int | None
) -> None:
    """Ragged rows and heads, two tiers, single tokens gone; 33 new tokens are a chunk."""
    seed = fresh_seed()
    model = tiny("llama", seed, dtype, num_hidden_layers=1)
    keys = {"kind": "kivi", "group": 16} if quantizer == "kivi" else {"kind": "uniform", "axis": "token"}
    ladder = [{"tier": "packed", "capacity": 32}, {"tier": "fp16" if quantizer == "exact" else "int2"}]
    rows = [prompt(seed + i, length)[0] for i, length in enumerate((LONG, 90))]
    batch = left_padded(rows)
    cache = filled(
        model,
        contiguous(keys=keys, ladder=ladder, policy={"kind": "h2o"}),
        batch["input_ids"],
        batch["attention_mask"],
        max_cache_len,
    )
    layer = cache.layers[0]
    if quantizer == "kivi":  # whole tiles go
        assign_layer(layer, _without_tiles(layer))
    else:
        evict(cache, 0.5)
    assert int((layer.held.tier_map() >= 0).sum(-1).max()) < LONG - 8
    layer.holding = True  # the reference reads the new tokens as exactly as attention does
    query = torch.randn(2, 4, queries, 16, dtype=dtype)
    new = torch.randn(2, 2, 2, queries, 16, dtype=dtype)
    handles = cache.update(new[0], new[1], 0)
    chunk = layer.pending is not None
    assert chunk == (queries > 32)
    found = fade_attention(torch.nn.Identity(), query, *handles, None)[0]
    cache.settle()
    torch.testing.assert_close(found.double(), dense(layer, query), rtol=0, atol=2e-5)


def _without_tiles(layer: TieredLayer) -> Tensor:
    """A wish to evict every second packed tile of each head, beginning with another one in each."""
    wanted = layer.held.tier_map()
    for store in layer.held.stores:
        for row, head, tile in (store.table.live_ids() >= 0).nonzero().tolist():
            if (row + head + tile) % 2:
                at = store.live_positions()[row, head, tile * TILE : (tile + 1) * TILE]
                wanted[row, head, at[at >= 0]] = -1
    return wanted


@BOTH
def test_what_lies_behind_every_hole_is_read_in_pieces(
    monkeypatch: pytest.MonkeyPatch, max_cache_len: int | None
) -> None:
    """Pieces of two tiles: some are moved, later ones are left to the quantizer."""
    monkeypatch.setattr("fade_core.ops.reference.READ_AT_ONCE", 2 * TILE)
    monkeypatch.setattr("fade_core.cache.prompt.READ_AT_ONCE", TILE + 3)
    model = tiny("llama", fresh_seed(), num_hidden_layers=1)
    for queries in (3, 40):
        cache = filled(model, contiguous(**TOKENS), prompt(fresh_seed(), 200), max_cache_len=max_cache_len)
        layer = cache.layers[0]
        wanted = layer.held.tier_map()
        wanted[..., 40:60] = -1
        assign_layer(layer, wanted)
        layer.holding = True
        query, new = torch.randn(1, 4, queries, 16).double(), torch.randn(2, 1, 2, queries, 16).double()
        found = fade_attention(torch.nn.Identity(), query, *cache.update(new[0], new[1], 0), None)[0]
        cache.settle()
        torch.testing.assert_close(found, dense(layer, query), rtol=0, atol=1e-5)


@BOTH
def test_hidden_tokens_are_no_holes(max_cache_len: int | None) -> None:
    """Tokens masked in the middle, some of them evicted: whoever counts positions by the mask never counted them."""
    model = tiny("llama", fresh_seed(), num_hidden_layers=1)
    ids = prompt(fresh_seed(), LONG)
    mask = torch.ones(1, LONG + 1, dtype=torch.long)
    mask[:, 30:50] = 0
    logits = {}
    for name in ("hidden ones go", "they stay"):
        with create_tiered_cache(model, contiguous(ladder=EXACT), max_cache_len) as cache, torch.no_grad():
            places = (mask.cumsum(1) - 1).clamp_min(0)
            model(
                input_ids=ids,
                attention_mask=mask[:, :-1],
                position_ids=places[:, :-1],
                past_key_values=cache,
                use_cache=True,
            )
            wanted = cache.layers[0].held.tier_map()
            if name == "hidden ones go":
                wanted[..., 34:48] = -1
                assign_layer(cache.layers[0], wanted)
            new = ids[:, :1]
            logits[name] = model(
                input_ids=new, attention_mask=mask, position_ids=places[:, -1:], past_key_values=cache, use_cache=True
            ).logits
    torch.testing.assert_close(*logits.values(), rtol=0, atol=1e-6)


# --- nothing is quantized again --------------------------------------------------------------------------------------


def segments(layer: TieredLayer) -> list[Any]:
    """What a step of one token reads: packed tiers and the window."""
    return segments_of(layer.plan.step(), layer.steps.wire(layer.held), None, on_host=True)[0]


def moved_keys(cache: TieredKVCache) -> Tensor:
    """Keys of every packed survivor where a query meets them, in order of position, one row and head after the other."""
    layer = cache.layers[0]
    found = []
    held = [store for store in layer.held.stores if store.tiles]
    for store, segment in zip(held, segments(layer), strict=False):  # the window comes last
        keys, at = store.decode(0), store.live_positions()
        keys = keys if segment.shift is None else segment.shift.moved(keys)
        order = at.masked_fill(at < 0, 10**6).argsort(-1)
        live = at.gather(2, order) >= 0
        found.append(keys.gather(2, order[..., None].expand_as(keys))[live])
    return torch.cat(found)


def test_keys_after_32_reassigns_are_those_after_one() -> None:
    """Bit for bit, so that their error is the same too."""
    seed = fresh_seed()
    model = tiny("llama", seed, torch.float32, num_hidden_layers=1)
    ids = prompt(seed, 700)
    once, often = (filled(model, contiguous(**TOKENS), ids) for _ in range(2))
    exact = filled(model, contiguous(ladder=EXACT), ids)
    tiers = once.layers[0].held.tier_map()
    packed = (tiers[0, 0] > 0).nonzero().flatten()
    gone = packed[torch.randperm(len(packed))[: 32 * 12]].split(12)
    assert len(gone) == 32
    for part in gone:
        wanted = often.layers[0].held.tier_map()
        wanted[..., part] = -1
        assign_layer(often.layers[0], wanted)
        moved_keys(often)
    for cache in (once, exact):
        wanted = cache.layers[0].held.tier_map()
        wanted[..., torch.cat(gone)] = -1
        assign_layer(cache.layers[0], wanted)
    assert torch.equal(moved_keys(often), moved_keys(once))
    errors = [
        float((moved_keys(cache) - moved_keys(exact)).norm() / moved_keys(exact).norm()) for cache in (once, often)
    ]
    assert errors[0] == errors[1]
    plain = float((once.layers[0].held.stores[0].decode(0) - exact.layers[0].held.stores[0].decode(0)).norm())
    assert errors[0] == pytest.approx(plain / float(exact.layers[0].held.stores[0].decode(0).norm()), rel=1e-4)


# --- every mode ------------------------------------------------------------------------------------------------------


def halved(policy: str, rung: dict[str, Any]) -> FadeConfig:
    return contiguous(policy={"kind": policy, "budget": 0.5, "every": 8}, **rung)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny("llama", fresh_seed(), num_hidden_layers=2)


def greedy(model: PreTrainedModel, cache: TieredKVCache, inputs: dict[str, Tensor], new: int, **options: Any) -> Tensor:
    found: Tensor = model.generate(
        **inputs, past_key_values=cache, do_sample=False, max_new_tokens=new, min_new_tokens=new, **options
    )
    return found


@pytest.mark.parametrize(
    ("rung", "policy", "max_cache_len"),
    by_turns(LENGTH, ["exact", "tiles", "tokens"], ["position", "h2o"]),
)
def test_padded_rows_equal_their_unpadded_runs(
    model: PreTrainedModel, rung: str, policy: str, max_cache_len: int | None
) -> None:
    seed, new = fresh_seed(), 17  # of each row a tile fills, and tokens are ranked twice
    rows = [prompt(seed + i, length)[0] for i, length in enumerate((101, 164, 60))]
    batch = left_padded(rows)
    config = halved(policy, {"exact": {"ladder": EXACT}, "tiles": TILES, "tokens": TOKENS}[rung])
    with create_tiered_cache(model, config, max_cache_len) as together:
        tokens = greedy(model, together, batch, new)
    width = batch["input_ids"].shape[1]
    for row, ids in enumerate(rows):
        with create_tiered_cache(model, config, max_cache_len) as alone:
            own = greedy(model, alone, {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}, new)
        assert torch.equal(tokens[row, width - len(ids) :], own[0])


@BOTH
def test_turns_beams_and_rejected_tokens(model: PreTrainedModel, max_cache_len: int | None) -> None:
    """What generate does to rows and lengths leaves the positions right: the next pass is as the dense reference says."""
    ids = prompt(fresh_seed(), 150, rows=2)
    with create_tiered_cache(model, halved("h2o", TOKENS), max_cache_len) as cache:
        greedy(model, cache, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 10, num_beams=3)
        read(model, cache, torch.cat([ids[:, :40]] * 3, 0), 40)
        cache.crop(-5)
        cache.batch_select_indices(torch.tensor([4, 0, 0, 1]))
        read(model, cache, ids[:1, :3].expand(4, -1), 3)
        for layer in cache.tiered:
            assert int((layer.held.tier_map() < 0).sum()) > 0
            query, new = torch.randn(4, 4, 2, 16).double(), torch.randn(2, 4, 2, 2, 16).double()
            layer.holding = True
            found = fade_attention(torch.nn.Identity(), query, *layer.update(new[0], new[1]), None)[0]
            torch.testing.assert_close(found, dense(layer, query), rtol=0, atol=2e-5)


@BOTH
def test_a_saved_cache_goes_on_with_the_same_logits(
    model: PreTrainedModel, tmp_path: Path, max_cache_len: int | None
) -> None:
    ids = prompt(fresh_seed(), 200)
    cache = filled(model, halved("h2o", TOKENS), ids[:, :190], max_cache_len=max_cache_len)
    cache.save(tmp_path / "cache.safetensors")
    again = TieredKVCache.load(tmp_path / "cache.safetensors", model)
    assert again.config.reposition == "contiguous"
    with again:
        others = read(model, again, ids[:, 190:], 1)
    with create_tiered_cache(model, halved("h2o", TOKENS)) as fresh:
        fresh.load_cache_state_dict(cache.cache_state_dict())
        assert torch.equal(read(model, fresh, ids[:, 190:], 1), others)
    other = create_tiered_cache(model, halved("h2o", TOKENS).with_overrides(reposition="keep"))
    with other, pytest.raises(CheckpointError, match="another configuration"):
        other.load_cache_state_dict(cache.cache_state_dict())


@BOTH
@pytest.mark.parametrize("rung", [TILES, TOKENS], ids=["tiles", "tokens"])
def test_shifts_are_among_the_bytes_that_are_reported(
    model: PreTrainedModel, rung: dict[str, Any], max_cache_len: int | None
) -> None:
    ids = prompt(fresh_seed(), 200)
    with create_tiered_cache(model, halved("h2o", rung), max_cache_len) as cache:
        read(model, cache, ids, 190, 1)
        assert any(name.endswith("/shift") for layer in cache.tiered for name in layer.tensors())
        assert cache.memory_report().total == live_bytes(cache)


@pytest.mark.parametrize(("policy", "max_cache_len"), [("position", None), ("h2o", None), ("h2o", LENGTH)])
def test_budgets_in_bytes_hold(model: PreTrainedModel, policy: str, max_cache_len: int | None) -> None:
    config = contiguous(policy={"kind": policy, "budget": "60KB", "every": 8}, **TOKENS)
    with create_tiered_cache(model, config, max_cache_len) as cache:
        for start in range(100):
            read(model, cache, prompt(start, 300) if not start else prompt(start, 2), 300)
            assert sum(storage_bytes(layer.tensors()) for layer in cache.tiered) <= 60_000
        assert int((cache.tiered[0].held.tier_map() < 0).sum()) > 0


@BOTH
def test_where_nothing_is_evicted_nothing_changes(model: PreTrainedModel, max_cache_len: int | None) -> None:
    ids = prompt(fresh_seed(), 200)
    logits = []
    for mode in ("keep", "contiguous"):
        with create_tiered_cache(model, contiguous(reposition=mode), max_cache_len) as cache:
            logits.append(read(model, cache, ids, 150, 1, 9))
            parts = [segment for layer in cache.tiered for segment in segments(layer)]
            assert all(segment.shift is None for segment in parts if isinstance(segment, PackedSegment))
    assert torch.equal(*logits)


# --- kernels ---------------------------------------------------------------------------------------------------------


class Strict(TorchDecodeAttention):
    """A kernel that knows nothing of shifts, and notes what it is given."""

    name: ClassVar[str] = "strict"
    priority: ClassVar[int] = 50
    shifts: ClassVar[bool] = False
    seen: ClassVar[list[Any]] = []

    def __call__(self, query: Tensor, segments: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen.extend(segments)
        return super().__call__(query, segments, *args, **kwargs)


class StrictPlugin:
    @staticmethod
    @hookimpl
    def fade_kernels() -> list[type[Kernel]]:
        return [Strict]


def stepped(model: PreTrainedModel, config: FadeConfig, ids: Tensor) -> tuple[Tensor, list[str], list[Any]]:
    """Logits of single steps, reasons of fallbacks, and the segments that the kernel saw."""
    Strict.seen.clear()
    with create_tiered_cache(model, config) as cache:
        events = Events()
        cache.sinks.append(events)
        logits = read(model, cache, ids, 190, 1)
    return logits, events.fallbacks(), list(Strict.seen)


def test_streaming_stays_on_kernels_and_evicted_tokens_in_between_do_not(model: PreTrainedModel) -> None:
    """A kernel without shifts serves sinks and window: sinks reach it moved. What it cannot read the oracle does."""
    ids = prompt(fresh_seed(), 220)
    for policy in ("position", "h2o"):
        config = halved(policy, TOKENS)
        wanted = stepped(model, config, ids)[0]
        with use_registry(Registry([StrictPlugin])):
            logits, reasons, seen = stepped(model, config, ids)
        torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-9)
        assert all(segment.shift is None for segment in seen if isinstance(segment, PackedSegment))
        if policy == "position":
            assert reasons == []
            assert any(isinstance(segment, FullSegment) for segment in seen)
        else:
            assert len(reasons) == 2
            assert all("reposition" in reason for reason in reasons)


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(kind: type[Exception], model: PreTrainedModel, **options: Any) -> str:
    limit = options.pop("max_cache_len", None)
    before = model.config._attn_implementation
    with pytest.raises(kind) as caught:
        create_tiered_cache(model, contiguous(**options), max_cache_len=limit)
    assert model.config._attn_implementation == before
    return str(caught.value)


def test_without_the_plugin_it_says_what_to_install(model: PreTrainedModel) -> None:
    with use_registry(Registry(entry_points=False)):
        assert "pip install fade-rope" in refused(ConfigError, model)
        create_tiered_cache(model, FadeConfig(reposition="keep")).detach()


@pytest.mark.parametrize(
    ("model_type", "fields", "says"),
    [
        ("gpt2", {"head_dim": ..., "num_key_value_heads": ..., "intermediate_size": ...}, "wpe"),
        ("bloom", {"head_dim": ..., "num_key_value_heads": ..., "intermediate_size": ...}, "ALiBi"),
        ("falcon", {"head_dim": ..., "num_key_value_heads": ..., "intermediate_size": ..., "alibi": True}, "ALiBi"),
    ],
)
def test_models_without_positions_in_their_keys_are_refused_by_name(
    model_type: str, fields: dict[str, Any], says: str
) -> None:
    model = tiny(model_type, fresh_seed(), torch.float32, **fields)
    message = refused(UnsupportedModelError, model)
    assert type(model).__name__ in message
    assert says in message


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_grow_are_refused_unless_they_cannot(kind: str) -> None:
    parameters: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
        parameters |= {"original_max_position_embeddings": 256, **factors}
    model = tiny("llama", fresh_seed(), **ONE_LAYER, rope_parameters=parameters, max_position_embeddings=256)
    for limit in (None, 257):
        message = refused(ConfigError, model, max_cache_len=limit)
        assert kind in message
        assert "max_cache_len=256" in message
    create_tiered_cache(model, contiguous(), max_cache_len=256).detach()
    assert compared(model, "keep") > 1e-2
    ids = prompt(fresh_seed(), LONG + 20)
    with create_tiered_cache(model, contiguous(ladder=EXACT), max_cache_len=256) as cache:
        read(model, cache, ids[:, :LONG], LONG)
        kept = evict_alike(cache, 0.5)
        found = read(model, cache, ids[:, LONG:], 1)
    torch.testing.assert_close(found, from_scratch(model, ids[:, kept], ids[:, LONG:]), rtol=0, atol=1e-4)


def test_the_models_own_attention_is_refused(model: PreTrainedModel) -> None:
    assert "keeps its own attention" in refused(ConfigError, model, attention="stock")


def test_a_scheme_that_contradicts_the_model_is_refused(model: PreTrainedModel) -> None:
    message = refused(ConfigError, model, rope={"kind": "yarn"})
    assert "LlamaForCausalLM, layer 0" in message
    assert "auto" in message
    create_tiered_cache(model, contiguous(rope={"kind": "default"})).detach()


def test_layers_have_their_own_embeddings() -> None:
    """Gemma 3: full-attention layers are tiered and have another base than sliding ones; SmolLM3: some do not rotate."""
    gemma = tiny("gemma3_text", fresh_seed(), layer_types=["sliding_attention", "full_attention", "full_attention"])
    cache = create_tiered_cache(gemma, contiguous())
    thetas = [layer.plan.rope.spec.theta for layer in cache.tiered]
    cache.detach()
    assert thetas == [gemma.config.rope_parameters["full_attention"]["rope_theta"]] * 2
    assert not math.isclose(thetas[0], gemma.config.rope_parameters["sliding_attention"]["rope_theta"])
    mixed = tiny("smollm3", fresh_seed(), no_rope_layers=[1, 0, 1])
    cache = create_tiered_cache(mixed, contiguous())
    cache.detach()
    assert [layer.plan.rope is None for layer in cache.tiered] == [False, True, False]


def test_the_schemes_that_are_used_pass_the_conformance_kit() -> None:
    assert all(result.passed for result in check_rope("auto", seed=fresh_seed()))


@pytest.mark.parametrize("limit", [None, 256])
def test_layers_that_are_ranked_together_keep_what_each_keeps_alone(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_alike(CONTIGUOUS, limit, monkeypatch)
