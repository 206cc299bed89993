"""Rows leave and join a cache while it decodes: each says what it would have said alone, and bytes go with the rows."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from reference import stored
from serving import Request, Server, admit_together, alone
from test_zoo import FAMILIES, STOCK
from tinymodels import fresh_seed, prompt, tiny
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.errors import InputError
from fade_core.support.memory import live_bytes

SHORT = {"n_sink": 4, "recent_window": 16, "tile": 16}
RUNGS = [{"tier": "int4", "capacity": 0.3}, {"tier": "int2"}]
TOKENS = {"kind": "uniform", "axis": "token"}
CONFIGS = {
    "heads apart, tokens": FadeConfig(
        **SHORT,
        keys=TOKENS,
        ladder=RUNGS,
        policy={"kind": "adakv", "budget": 0.6, "every": 8, "floor": 0.1, "base": {"kind": "h2o"}},
    ),
    "heads apart, tiles": FadeConfig(
        **SHORT,
        keys={"kind": "uniform", "axis": "channel"},
        policy={"kind": "adakv", "budget": 0.5, "every": 5, "floor": 0.0, "base": {"kind": "snapkv", "window": 8}},
    ),
    "unbounded": FadeConfig(**SHORT, keys={"kind": "kivi", "group": 16}, values={"kind": "kivi", "group": 16}),
    "by age": FadeConfig(**SHORT, ladder=RUNGS, policy={"kind": "position", "budget": 120, "every": 7}),
    "expected": FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "expected_attention", "budget": 0.5, "every": 6}),
    "exact": FadeConfig(**SHORT, ladder=[{"tier": "fp16"}]),
}


LENGTH = 1000
BOTH = pytest.mark.parametrize("max_cache_len", [None, LENGTH])


@functools.cache
def model() -> PreTrainedModel:
    return tiny("llama", fresh_seed(), num_hidden_layers=2, num_key_value_heads=4, num_attention_heads=8)


@functools.cache
def said_alone(name: str, seed: int, length: int, wanted: int) -> tuple[int, ...]:
    """What a request's row says alone, in a cache that grows: whatever the others' ``max_cache_len``."""
    return tuple(alone(model(), CONFIGS[name], Request(prompt(seed, length)[0], wanted)))


def requests(seed: int, lengths: list[int], wanted: list[int]) -> list[Request]:
    return [Request(prompt(seed + i, n)[0], w) for i, (n, w) in enumerate(zip(lengths, wanted, strict=True))]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "max_cache_len"),
    [("heads apart, tokens", LENGTH), ("heads apart, tiles", None), ("unbounded", LENGTH)],
)
def test_eight_rows_of_40_to_900_tokens_leave_and_join(name: str, max_cache_len: int | None) -> None:
    """Starts as one left-padded batch; the longest row leaves first, and others join as soon as there is room."""
    seed, config = fresh_seed(), CONFIGS[name]
    first = requests(seed, [40, 900, 310, 77, 512, 150, 663, 201], [14, 4, 12, 19, 7, 16, 6, 10])
    later = requests(seed + 50, [333, 45, 720, 128], [9, 14, 6, 8])
    every = [*first, *later]
    server, lengths = Server(model(), config, max_cache_len), [900]

    def watch(cache: TieredKVCache) -> None:
        lengths.append(cache.get_seq_length())
        assert cache.memory_report().total == live_bytes(cache)

    admit_together(server, first)
    server.serve(later, 8, watch)
    assert min(lengths) < 900 < max(lengths), "the logical length never shrank"
    assert max_cache_len or live_bytes(server.cache) == live_bytes(server.spare) == 0
    for request in every:
        assert request.said == alone(model(), config, request), len(request.prompt)


@pytest.mark.parametrize(
    ("name", "max_cache_len"), [(n, (None, 300)[i % 2]) for i, n in enumerate(CONFIGS)] + [("by age", None)]
)
def test_an_empty_cache_is_filled_by_rows_that_join(name: str, max_cache_len: int | None) -> None:
    seed, config = fresh_seed(), CONFIGS[name]
    every = requests(seed, [90, 23, 160, 7, 201, 64], [13, 19, 5, 9, 8, 12])
    Server(model(), config, max_cache_len).serve(list(every), 3)
    for number, request in enumerate(every):
        wanted = said_alone(name, seed + number, len(request.prompt), request.wanted)
        assert tuple(request.said) == wanted, len(request.prompt)


@pytest.mark.parametrize(
    ("family", "max_cache_len"),
    [
        ("gemma3_text", None),
        ("gemma4_text", LENGTH),
        ("gpt_oss", None),
        ("qwen3_next", LENGTH),
        ("falcon", None),
        ("gpt2", LENGTH),
    ],
)
def test_layers_of_transformers_own_join_too(family: str, max_cache_len: int | None) -> None:
    """Sliding windows that are full and that are not, states of linear attention, a model that keeps its own attention."""
    seed = fresh_seed()
    network = tiny(family, seed, **FAMILIES[family])
    config = CONFIGS["exact" if family in STOCK else "by age"]
    every = requests(seed, [60, 9, 130, 5, 40], [17, 22, 5, 20, 8])
    Server(network, config, max_cache_len).serve(list(every), 3)
    for request in every:
        assert request.said == alone(network, config, request), len(request.prompt)


@BOTH
def test_states_of_linear_attention_are_chosen_and_repeated_with_their_rows(max_cache_len: int | None) -> None:
    """Rows chosen by number, by bool and repeated go on as each alone."""
    seed = fresh_seed()
    network = tiny("qwen3_next", seed, **FAMILIES["qwen3_next"])
    ids = prompt(seed, 30, 3)
    with create_tiered_cache(network, CONFIGS["exact"], max_cache_len) as cache, torch.no_grad():
        cache.prefill(network, ids)
        cache.batch_select_indices(torch.tensor([2, 0]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([True, False, True, True]))
        token = ids[[2, 0, 0], -1:]
        found = network(token, past_key_values=cache).logits
        single = []
        for row in (2, 0, 0):  # a step after a prompt, as above: read at once, states are summed in another order
            past = DynamicCache(config=network.config)
            network(ids[row : row + 1], past_key_values=past)
            single.append(network(ids[row : row + 1, -1:], past_key_values=past).logits)
    for ours, wanted in zip(found, single, strict=True):
        torch.testing.assert_close(ours[None], wanted, rtol=0, atol=1e-4 * float(wanted.std()))


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_go_with_the_rows_that_leave(name: str) -> None:
    """What is left is what the rows that stay would hold alone, and a little slack."""
    seed, config = fresh_seed(), CONFIGS[name]
    every = requests(seed, [700, 60, 500], [1, 1, 1])
    server = Server(model(), config)
    cache, spare = server.cache, server.spare
    for request in every:
        server.admit(request)
        assert spare.compressed_storage_bytes() == live_bytes(spare) == 0
        assert cache.compressed_storage_bytes() == live_bytes(cache)
    full = live_bytes(cache)
    assert cache.keep_rows([1]) == 700 - 60
    assert cache.get_seq_length() == cache.memory_report().tokens == 60
    assert cache.compressed_storage_bytes() == live_bytes(cache)
    spare.prefill(model(), every[1].prompt[None])
    assert live_bytes(cache) <= 1.1 * live_bytes(spare) < full / 3
    for layer, other in zip(cache.tiered, spare.tiered, strict=True):
        mine, theirs = stored(layer), stored(other)
        assert torch.equal(mine.tier, theirs.tier)
        assert torch.equal(mine.keys, theirs.keys)


def test_joining_costs_no_more_than_both_held() -> None:
    seed, config = fresh_seed(), CONFIGS["heads apart, tokens"]
    with create_tiered_cache(model(), config) as cache, create_tiered_cache(model(), config) as spare:
        cache.prefill(model(), prompt(seed, 400, 2))
        spare.prefill(model(), prompt(seed + 1, 380))
        before = live_bytes(cache) + live_bytes(spare)
        assert cache.add_rows(spare) == (0, 20)
        assert live_bytes(spare) == 0
        assert live_bytes(cache) <= 1.05 * before


# --- positions --------------------------------------------------------------------------------------------------------


@BOTH
def test_the_shorter_side_gets_padding_and_common_padding_is_cut_off(max_cache_len: int | None) -> None:
    seed, config = fresh_seed(), CONFIGS["by age"]
    with (
        create_tiered_cache(model(), config, max_cache_len) as cache,
        create_tiered_cache(model(), config, max_cache_len) as spare,
    ):
        for length, added in ((50, (0, 0)), (80, (30, 0)), (20, (0, 60))):
            spare.prefill(model(), prompt(seed + length, length))
            assert cache.add_rows(spare) == added
        assert cache.leading_padding.tolist() == [30, 0, 60]
        assert cache.keep_rows(torch.tensor([False, True, True]), trim=False) == 0
        assert cache.keep_rows([1, 0]) == 0
        assert cache.leading_padding.tolist() == [60, 0]
        assert cache.keep_rows([0], trim=False) == 0
        assert (cache.get_seq_length(), cache.leading_padding.tolist()) == (80, [60])
        assert cache.keep_rows([0]) == 60
        assert (cache.get_seq_length(), cache.leading_padding.tolist()) == (20, [0])
        cache.reset()
        assert cache.leading_padding.tolist() == []


@BOTH
def test_rows_that_joined_are_saved_and_go_on(tmp_path: Path, max_cache_len: int | None) -> None:
    seed, config = fresh_seed(), CONFIGS["heads apart, tokens"]
    every = requests(seed, [90, 23, 160], [18, 30, 12])
    server = Server(model(), config, max_cache_len)
    for request in every:
        server.admit(request)
        for _ in range(3):
            server.step()
    server.cache.save(tmp_path / "rows.safetensors")
    server.cache = TieredKVCache.load(tmp_path / "rows.safetensors", model())
    server.serve([], 3)
    for number, request in enumerate(every):
        wanted = said_alone("heads apart, tokens", seed + number, len(request.prompt), request.wanted)
        assert tuple(request.said) == wanted


# --- what is refused ----------------------------------------------------------------------------------------------------


def filled(
    length: int, network: PreTrainedModel | None = None, max_cache_len: int | None = None, **fields: object
) -> TieredKVCache:
    network = network or model()
    config = CONFIGS["by age"].with_overrides(**fields) if fields else CONFIGS["by age"]
    cache = create_tiered_cache(network, config, max_cache_len)
    cache.prefill(network, prompt(1, length))
    return cache


def snapshot(cache: TieredKVCache) -> dict[str, Tensor]:
    return {f"{layer.index}.{n}": t.clone() for layer in cache.tiered for n, t in layer.tensors().items()}


def assert_refused(cache: TieredKVCache, other: TieredKVCache, reason: str) -> None:
    before = [snapshot(cache), snapshot(other)]
    with pytest.raises(InputError, match=reason):
        cache.add_rows(other)
    for found, wanted in zip((snapshot(cache), snapshot(other)), before, strict=True):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_caches_that_cannot_be_one_are_refused_and_unchanged() -> None:
    cache, empty = filled(60), create_tiered_cache(model(), CONFIGS["by age"])
    narrow = tiny("llama", 1, num_hidden_layers=2)
    single = tiny("llama", 1, torch.float32, num_hidden_layers=2, num_key_value_heads=4, num_attention_heads=8)
    single.load_state_dict(model().state_dict())
    others = tiny("llama", fresh_seed() + 1, num_hidden_layers=2, num_key_value_heads=4, num_attention_heads=8)
    assert_refused(cache, empty, "holds no tokens")
    assert_refused(cache, cache, "cannot join itself")
    assert_refused(cache, filled(60, narrow), "different shapes")
    assert_refused(cache, filled(60, others), "different weights")
    assert_refused(cache, filled(60, n_sink=5), "different configurations")
    same_mark = filled(60, single)
    same_mark.weights_fingerprint = cache.weights_fingerprint  # too few of the weights tell the precisions apart
    assert_refused(cache, same_mark, "holds torch.float64 on cpu, the other torch.float32")
    with pytest.raises(InputError, match="a str cannot join a TieredKVCache"):
        cache.add_rows("rows")  # type: ignore[arg-type]


@BOTH
def test_caches_in_the_middle_of_something_are_refused(max_cache_len: int | None) -> None:
    cache, other = filled(60, max_cache_len=max_cache_len), filled(50, max_cache_len=max_cache_len)
    other.activate_past_recording()
    assert_refused(cache, other, "the cache that should join records the past")
    assert_refused(other, cache, "this cache records the past")
    other = filled(50, max_cache_len=max_cache_len)
    with other.holding():
        assert_refused(cache, other, "holding")
    with cache.reading():
        assert_refused(cache, other, "reading")
        with pytest.raises(InputError, match="reading"):
            cache.keep_rows([0])
    keys = torch.randn(1, 4, 1, 16, dtype=torch.float64)
    other.update(keys, keys, 0)  # and no layer after it
    assert_refused(cache, other, "interrupted; settle")
    other.settle()
    assert cache.add_rows(other) == (0, 10)


def test_what_does_not_fit_is_refused() -> None:
    short = create_tiered_cache(model(), CONFIGS["by age"], max_cache_len=55)
    assert_refused(short, filled(60), "60 tokens, more than max_cache_len=55")
    fixed = {"policy": {"kind": "h2o", "budget": "180 KiB"}}
    cache, other = filled(60, **fixed), filled(60, **fixed)
    assert cache.add_rows(other) == (0, 0)
    other.prefill(model(), prompt(2, 60))
    cache.keep_rows([0, 1])
    for _ in range(9):
        if cache.tiered[0].plan.ladder.budget.shortfall(cache.batch_size + 1):  # type: ignore[union-attr]
            break
        cache.add_rows(other)
        other.prefill(model(), prompt(2, 60))
    assert_refused(cache, other, "rows take .* bytes a layer, more than")


def test_rows_that_are_not_there_are_refused() -> None:
    cache = filled(60)
    before = snapshot(cache)
    for rows, reason in (
        ([], "no row would be left"),
        (torch.tensor([False]), "no row would be left"),
        ([1], "rows must be 0..0"),
        ([-1], "rows must be 0..0"),
        ([0, 0], "name one twice"),
        ([0.0], "row numbers"),
        (torch.zeros(1, 1, dtype=torch.long), "row numbers"),
        (torch.tensor([True, False]), r"bool \[2\]; the cache has 1 rows"),
    ):
        with pytest.raises(InputError, match=reason):
            cache.keep_rows(rows)
        assert all(torch.equal(snapshot(cache)[name], tensor) for name, tensor in before.items())
    with pytest.raises(InputError, match="it has no rows"):
        create_tiered_cache(model(), CONFIGS["by age"]).keep_rows([0])


@BOTH
def test_quantizers_that_learnt_from_different_prompts_are_refused_by_name(max_cache_len: int | None) -> None:
    """But an empty cache takes over what was learnt, with the rows."""
    seed = fresh_seed()
    side = {"kind": "self-calibrated", "bits": 6.0}
    config = FadeConfig(keys=side, values=side, n_sink=4, recent_window=16)
    every = requests(seed, [300, 280], [12, 12])
    server = Server(model(), config, max_cache_len)
    server.admit(every[0])
    server.spare.prefill(model(), every[1].prompt[None])
    assert_refused(server.cache, server.spare, "quantizer 'self-calibrated' of the keys .* learnt .* cannot share")
    server.serve([], 1)
    assert every[0].said == alone(model(), config, every[0])
