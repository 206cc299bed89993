"""Input that cannot work: refused with what was found and what would work, and nothing has changed."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from families import assert_same_state, feed, greedy, left_padded, spoiled, tiny_gemma3
from tiny import by_turns, fresh_seed, tiny_llama
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.builtin.telemetry import Collector, attach_telemetry
from fade_core.cache import layer as layer_module
from fade_core.errors import ConfigError, InputError, NonFiniteError, UnsupportedModelError
from fade_core.support.checks import FiniteCheck
from fade_core.support.memory import live_bytes

SMALL: dict[str, Any] = {"n_sink": 2, "recent_window": 16, "tile": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "packed": SMALL,
    "h2o": SMALL | {"policy": {"kind": "h2o", "budget": 0.5, "every": 3}},
    "ema": SMALL | {"policy": {"kind": "ema", "budget": 60, "every": 5}, "keys": {"kind": "uniform", "bits": 4}},
    "ladder": SMALL
    | {
        "policy": {"kind": "h2o", "every": 4},
        "keys": {"kind": "uniform", "bits": 4},
        "ladder": [
            {"tier": "fp16", "capacity": 16},
            {"tier": "int4", "capacity": 32},
            {"tier": "int2", "capacity": 48},
        ],
    },
    "oldest": SMALL | {"policy": {"kind": "position", "budget": 70, "every": 7}},
    "stock": SMALL | {"attention": "stock"},
}
LENGTH = 400
BOTH = pytest.mark.parametrize("max_cache_len", [None, LENGTH])
BAD = pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(fresh_seed())


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama(layers=3)


@pytest.fixture(scope="module")
def gemma() -> Any:
    return tiny_gemma3()


def pair(model: Any, name: str, max_cache_len: int | None) -> tuple[TieredKVCache, TieredKVCache]:
    """Two empty caches of one configuration."""
    config = FadeConfig(**CONFIGS[name])
    return create_tiered_cache(model, config, max_cache_len), create_tiered_cache(model, config, max_cache_len)


def refuse_step(model: Any, cache: TieredKVCache, ids: Tensor, mask: Tensor | None, layer: int) -> None:
    """A pass over ``ids`` that fails in ``layer`` must leave the cache bit by bit as it was."""
    before = cache.cache_state_dict()
    row, column = ids.shape[0] - 1, ids.shape[1] - 1
    start = cache.get_seq_length()
    where = f"layer {layer}: NaN or infinity in the keys at position {start + column} of row {row} "
    if cache.tiered[0].plan.finite.deferred:  # the last layer tells
        where = (
            f"layer {layer}: NaN or infinity in the keys or values of the {column + 1} tokens from position {start} on"
        )
    with spoiled(model, layer, "keys", row, column, math.nan), pytest.raises(NonFiniteError, match=where) as found:
        feed(model, ids, cache, mask)
    assert "The cache is as it was before this step." in str(found.value)
    assert "on_nonfinite" in str(found.value)
    assert_same_state(cache.cache_state_dict(), before)


# --- NaN and infinity ---


DEFERRED = (False, True)  # layer by layer, or once a pass as on a GPU


@pytest.mark.parametrize(("name", "deferred", "max_cache_len"), by_turns(LENGTH, CONFIGS, DEFERRED))
def test_a_decode_step_that_fails_in_a_deep_layer_never_happened(
    llama: Any, name: str, deferred: bool, max_cache_len: int | None
) -> None:
    """At every step of 8, and every row fills a tile in them: those which encode, demote, evict and rank fail too."""
    ids, mask = left_padded((126, 97))
    plain, tried = pair(llama, name, max_cache_len)
    tried.tiered[0].plan.finite.deferred = deferred
    expected, _ = greedy(llama, feed(llama, ids, plain, mask), plain, 8, mask)
    logits = feed(llama, ids, tried, mask)
    for step in range(8):
        token = logits.argmax(-1, keepdim=True)
        assert torch.equal(token[:, 0], expected[:, step])
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
        refuse_step(llama, tried, token, mask, layer=1 + step % 2)
        logits = feed(llama, token, tried, mask)
    assert_same_state(tried.cache_state_dict(), plain.cache_state_dict())


def test_what_is_noted_of_tokens_that_a_failed_step_has_moved_goes_back_to_them(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off a CPU a step hands tiles down itself, and they stay there: here two tokens of the window change places."""
    _, cache = pair(llama, "h2o", None)
    ids, mask = left_padded((60, 60))
    feed(llama, ids, cache, mask)
    take_in = layer_module.take_in

    def moving(plan: Any, keys: Tensor, values: Tensor, held: Any, rule: Any) -> None:
        for tensor in (held.keys, held.values, *held.notes.values()):
            tensor[:, :, [5, 9]] = tensor[:, :, [9, 5]]
        take_in(plan, keys, values, held, rule)

    window = cache.tiered[0].held.window
    before = {name: window.note(name).clone() for name in ("keys", "statistic.mass", "statistic.seen")}
    monkeypatch.setattr(layer_module, "take_in", moving)
    with spoiled(llama, 1, "keys", 1, 0, math.nan), pytest.raises(NonFiniteError):
        feed(llama, ids[:, :1], cache, torch.cat([mask, mask.new_ones(2, 1)], dim=1))
    order = list(range(window.longest))
    order[5], order[9] = order[9], order[5]
    for name, was in before.items():
        assert torch.equal(window.note(name), was[:, :, order]), name


@pytest.mark.parametrize(
    ("name", "size", "deferred", "max_cache_len"), by_turns(LENGTH, CONFIGS, [5, 33, 90], DEFERRED)
)
def test_a_chunk_that_fails_in_a_deep_layer_never_happened(
    llama: Any, name: str, size: int, deferred: bool, max_cache_len: int | None
) -> None:
    ids, mask = left_padded((120, 97))
    more = torch.randint(1, 256, (2, size))
    longer = torch.cat([mask, torch.ones_like(more)], dim=1)
    plain, tried = pair(llama, name, max_cache_len)
    for cache in (plain, tried):
        feed(llama, ids, cache, mask)
    tried.tiered[0].plan.finite.deferred = deferred
    refuse_step(llama, tried, more, longer, layer=1 if deferred else 2)
    found, expected = (greedy(llama, feed(llama, more, c, longer), c, 2, longer)[0] for c in (tried, plain))
    assert torch.equal(found, expected)
    assert_same_state(tried.cache_state_dict(), plain.cache_state_dict())


@pytest.mark.parametrize(("name", "deferred", "max_cache_len"), by_turns(LENGTH, CONFIGS, DEFERRED))
def test_a_prompt_that_fails_leaves_an_empty_cache(
    llama: Any, name: str, deferred: bool, max_cache_len: int | None
) -> None:
    ids, mask = left_padded((120, 97))
    plain, tried = pair(llama, name, max_cache_len)
    empty = live_bytes(tried)
    tried.tiered[0].plan.finite.deferred = deferred
    refuse_step(llama, tried, ids, mask, layer=1)
    if max_cache_len is None:
        assert live_bytes(tried) == empty
    assert tried.get_seq_length() == 0
    found, expected = (greedy(llama, feed(llama, ids, c, mask), c, 2, mask)[0] for c in (tried, plain))
    assert torch.equal(found, expected)
    assert_same_state(tried.cache_state_dict(), plain.cache_state_dict())


@pytest.mark.parametrize(("layer", "name", "max_cache_len"), by_turns(LENGTH, range(5), ["packed", "h2o"]))
def test_sliding_layers_are_checked_and_taken_back_too(
    gemma: Any, layer: int, name: str, max_cache_len: int | None
) -> None:
    ids = torch.randint(1, 256, (2, 70))
    plain, tried = pair(gemma, name, max_cache_len)
    refuse_step(gemma, tried, ids, None, layer)
    expected, _ = greedy(gemma, feed(gemma, ids, plain), plain, 7)
    logits = feed(gemma, ids, tried)
    for step in range(7):
        token = logits.argmax(-1, keepdim=True)
        assert torch.equal(token[:, 0], expected[:, step])
        refuse_step(gemma, tried, token, None, layer)
        logits = feed(gemma, token, tried)
    assert_same_state(tried.cache_state_dict(), plain.cache_state_dict())
    chunk = torch.randint(1, 256, (2, 50))
    refuse_step(gemma, tried, chunk, None, layer)
    assert torch.equal(feed(gemma, chunk, tried), feed(gemma, chunk, plain))


@BAD
@pytest.mark.parametrize("side", ["keys", "values"])
def test_the_message_names_layer_side_position_and_row(llama: Any, side: str, value: float) -> None:
    ids = torch.randint(1, 256, (3, 50))
    cache = create_tiered_cache(llama, FadeConfig(**SMALL))
    feed(llama, ids, cache)
    with (
        spoiled(llama, 2, side, 1, 4, value),
        pytest.raises(NonFiniteError, match=f"layer 2: NaN or infinity in the {side} at position 54 of row 1 "),
    ):
        feed(llama, ids[:, :9], cache)


def test_infinities_that_cancel_in_the_sum_are_found(llama: Any) -> None:
    cache = create_tiered_cache(llama, FadeConfig(**SMALL))
    keys, values = torch.zeros(2, 1, 2, 40, 16)
    keys[0, 0, 7, 3], values[0, 1, 7, 2] = math.inf, -math.inf
    with pytest.raises(NonFiniteError, match="position 7"):
        cache.update(keys, values, 0)


def test_a_finite_sum_that_overflows_is_no_reason_to_refuse(llama: Any) -> None:
    cache = create_tiered_cache(llama, FadeConfig(**SMALL))
    keys = torch.full((1, 2, 40, 16), 6e4, dtype=torch.float16)
    cache.update(keys, keys, 0)
    assert cache.tiered[0].logical == 40


@pytest.mark.parametrize(("family", "max_cache_len"), [("llama", None), ("gemma", None), ("llama", LENGTH)])
def test_zeros_are_stored_instead_where_the_configuration_says_so(
    family: str, max_cache_len: int | None, request: Any
) -> None:
    model = request.getfixturevalue(family)
    ids = torch.randint(1, 256, (2, 60))
    layer = 2
    config = FadeConfig(**SMALL, on_nonfinite="zero")
    zeroing, plain = (create_tiered_cache(model, config, max_cache_len) for _ in range(2))
    with spoiled(model, layer, "values", 1, 9, math.inf):
        found = feed(model, ids, zeroing)
    with spoiled(model, layer, "values", 1, 9, 0.0):
        expected = feed(model, ids, plain)
    assert torch.equal(found, expected)
    assert torch.equal(greedy(model, found, zeroing, 10)[0], greedy(model, expected, plain, 10)[0])


def test_a_state_that_cannot_be_taken_back_is_emptied_and_the_message_says_so() -> None:
    """Linear attention writes over its state: half a step would be worse than none."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        decoder_sparse_step=1,
        mlp_only_layers=[0, 1, 2, 3],
        layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    )
    model = Qwen3NextForCausalLM(config).eval()
    ids = torch.randint(1, 256, (1, 50))
    cache = create_tiered_cache(model, FadeConfig(**SMALL))
    expected, _ = greedy(model, feed(model, ids, cache), cache, 4)
    with spoiled(model, 3, "keys", 0, 0, math.nan), pytest.raises(NonFiniteError, match="whole cache was emptied"):
        feed(model, ids[:, :1], cache)
    assert cache.get_seq_length() == 0
    assert torch.equal(greedy(model, feed(model, ids, cache), cache, 4)[0], expected)


@BOTH
def test_a_roll_back_is_an_event(llama: Any, max_cache_len: int | None) -> None:
    cache = create_tiered_cache(llama, FadeConfig(**SMALL), max_cache_len)
    sink = Collector()
    attach_telemetry(cache, sink)
    feed(llama, torch.randint(1, 256, (1, 20)), cache)
    with spoiled(llama, 2, "keys", 0, 0, math.nan), pytest.raises(NonFiniteError):
        feed(llama, torch.randint(1, 256, (1, 3)), cache)
    event = sink.events[-1]
    assert (event.kind, event.layer, event.detail["length"]) == ("rollback", 2, 20)


@BOTH
def test_nothing_of_a_failed_step_stays_in_memory(llama: Any, max_cache_len: int | None) -> None:
    cache = create_tiered_cache(llama, FadeConfig(**CONFIGS["h2o"]), max_cache_len)
    feed(llama, torch.randint(1, 256, (2, 200)), cache)
    before = cache.memory_report()
    with spoiled(llama, 2, "keys", 0, 60, math.nan), pytest.raises(NonFiniteError):
        feed(llama, torch.randint(1, 256, (2, 90)), cache)
    # pools that grew keep up to a quarter of spare room; those that never grow are as they were
    most = before.total * (1.25 if max_cache_len is None else 1)
    assert live_bytes(cache) == cache.memory_report().total <= most


@BOTH
def test_a_deep_copy_is_taken_back_for_itself(llama: Any, max_cache_len: int | None) -> None:
    cache = create_tiered_cache(llama, FadeConfig(**CONFIGS["h2o"]), max_cache_len)
    ids = torch.randint(1, 256, (2, 90))
    feed(llama, ids, cache)
    twin = copy.deepcopy(cache)
    feed(llama, ids[:, :5], cache)  # what a copy is taken back to is its own
    refuse_step(llama, twin, ids[:, :3], None, layer=2)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (95, 90)
    feed(llama, ids[:, :5], twin)
    assert torch.equal(feed(llama, ids[:, :1], twin), feed(llama, ids[:, :1], cache))


@BAD
def test_where_answers_wait_zeros_are_stored_at_once(value: float) -> None:
    keys, values = torch.randn(2, 2, 3, 5, 4)
    keys[1, 1, 2, 3] = value
    check = FiniteCheck(last=3, deferred=True)
    found = check(0, keys, values, 0, "zero")
    assert float(found[0][1, 1, 2, 3]) == 0
    assert torch.equal(found[1], values)
    assert torch.isfinite(found[0]).all()


def test_answers_of_an_interrupted_pass_are_nobodys() -> None:
    good, bad = torch.randn(1, 1, 2, 4), torch.full((1, 1, 2, 4), math.nan)
    check = FiniteCheck(last=1, deferred=True)
    check(0, bad, good, 0, "raise")
    check(0, good, good, 0, "raise")
    check(1, good, good, 0, "raise")
    with pytest.raises(NonFiniteError, match=r"layer 1: .* from position 7 on"):
        check(0, good, good, 7, "raise"), check(1, good, bad, 7, "raise")
    check(0, bad, good, 0, "raise")
    with pytest.raises(NonFiniteError, match="layer 0: "):  # the last layer reads its own at once, and the others' too
        check(1, good, good, 0, "raise", at_once=True)
    half = torch.full((1, 1, 9, 64), 6e4, dtype=torch.float16)  # its sum is more than float16 holds
    check(1, half, half, 0, "raise")


# --- shapes, dtypes, batch ---


def kv(batch: int = 2, heads: int = 2, tokens: int = 1, dim: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, heads, tokens, dim).to(dtype)


WRONG: list[tuple[Any, Any, str]] = [
    (kv(dtype=torch.float16), kv(dtype=torch.float16), "keys are torch.float16 on cpu; the cache holds torch.float32"),
    (kv(), kv(dtype=torch.float64), "keys are torch.float32 and values torch.float64; both must be one floating type"),
    (kv().long(), kv().long(), "torch.int64"),
    (kv(dim=8), kv(dim=8), "keys have 2 heads of 8 channels; the cache holds 2 heads of 16"),
    (kv(), kv(dim=8), "values have 2 heads of 8 channels; the cache holds 2 heads of 16"),
    (kv(heads=4), kv(heads=4), "keys have 4 heads of 16 channels"),
    (kv(batch=3), kv(batch=3), "the batch has 3 rows, the cache holds 2; use batch_select_indices"),
    (kv(tokens=2), kv(tokens=1), "must both be"),
    (kv()[0], kv()[0], "must both be"),
    (kv(tokens=0), kv(tokens=0), "at least one token"),
]


@pytest.mark.parametrize(("keys", "values", "message"), WRONG)
@pytest.mark.parametrize("layer", [0, 2])
def test_tokens_that_do_not_fit_are_refused(llama: Any, layer: int, keys: Any, values: Any, message: str) -> None:
    ids = torch.randint(1, 256, (2, 90))
    plain, tried = (create_tiered_cache(llama, FadeConfig(**CONFIGS["h2o"])) for _ in range(2))
    logits = [feed(llama, ids, cache) for cache in (plain, tried)]
    before = tried.cache_state_dict()
    with pytest.raises(InputError, match=message) as found:
        tried.update(keys, values, layer)
    assert str(found.value).startswith(f"layer {layer}: ")
    assert_same_state(tried.cache_state_dict(), before)
    assert torch.equal(greedy(llama, logits[1], tried, 3)[0], greedy(llama, logits[0], plain, 3)[0])


@pytest.mark.parametrize(("keys", "values", "message"), [WRONG[4], WRONG[6]])
def test_sliding_layers_refuse_them_too(gemma: Any, keys: Any, values: Any, message: str) -> None:
    cache = create_tiered_cache(gemma, FadeConfig(**SMALL))
    feed(gemma, torch.randint(1, 256, (2, 50)), cache)
    before = cache.cache_state_dict()
    for layer in range(5):
        with pytest.raises(InputError, match=f"layer {layer}: {message}"):
            cache.update(keys, values, layer)
    assert_same_state(cache.cache_state_dict(), before)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_a_batch_that_changes_size_is_refused_by_the_model_too(family: str, request: Any) -> None:
    model = request.getfixturevalue(family)
    cache = create_tiered_cache(model, FadeConfig(**CONFIGS["h2o"]))
    logits = feed(model, torch.randint(1, 256, (2, 60)), cache)
    before = cache.cache_state_dict()
    with pytest.raises(InputError, match="the batch has 3 rows, the cache holds 2"):
        feed(model, torch.randint(1, 256, (3, 1)), cache)
    assert_same_state(cache.cache_state_dict(), before)
    greedy(model, logits, cache, 3)
    assert cache.get_seq_length() == 63


def test_the_first_tokens_must_have_the_models_head_dim(llama: Any) -> None:
    cache = create_tiered_cache(llama, FadeConfig(**SMALL))
    cache.update(kv(tokens=50), kv(tokens=50), 0)
    with pytest.raises(InputError, match="head_dim 24 and 24; this cache was built for 16 and 16"):
        cache.update(kv(tokens=50, dim=24), kv(tokens=50, dim=24), 1)
    assert cache.get_seq_length() == 0
    assert live_bytes(cache) == 0


def test_a_layer_that_does_not_exist_is_refused(llama: Any) -> None:
    cache = create_tiered_cache(llama)
    for layer in (-1, 3):
        with pytest.raises(InputError, match=f"layer {layer} does not exist: the cache was built for 3 layers"):
            cache.update(kv(), kv(), layer)


def test_crop_takes_no_positive_count(llama: Any) -> None:
    cache = create_tiered_cache(llama)
    feed(llama, torch.randint(1, 256, (1, 20)), cache)
    with pytest.raises(InputError, match="as a negative number; found 5"):
        cache.crop(5)
    assert cache.get_seq_length() == 20


# --- max_cache_len ---


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_tokens_past_max_cache_len_are_refused_before_anything_changes(family: str, request: Any) -> None:
    model = request.getfixturevalue(family)
    ids = torch.randint(1, 256, (1, 90))
    cache = create_tiered_cache(model, FadeConfig(**CONFIGS["h2o"]), max_cache_len=100)
    assert cache.get_max_length() == 100
    with pytest.raises(InputError, match="0 tokens are cached and 101 more would pass max_cache_len=100"):
        feed(model, torch.randint(1, 256, (1, 101)), cache)
    assert cache.get_seq_length() == 0
    logits = feed(model, ids, cache)
    before = cache.cache_state_dict()
    with pytest.raises(InputError, match="90 tokens are cached and 11 more"):
        feed(model, ids[:, :11], cache)
    assert_same_state(cache.cache_state_dict(), before)
    free = create_tiered_cache(model, FadeConfig(**CONFIGS["h2o"]))
    expected = feed(model, ids, free)
    assert torch.equal(greedy(model, logits, cache, 10)[0], greedy(model, expected, free, 10)[0])
    with pytest.raises(InputError, match="100 tokens are cached and 1 more"):
        feed(model, ids[:, :1], cache)


def test_generate_stops_at_max_cache_len_with_the_message(llama: Any) -> None:
    cache = create_tiered_cache(llama, max_cache_len=100)
    with pytest.raises(InputError, match="max_cache_len=100"):
        llama.generate(torch.randint(1, 256, (1, 90)), past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert cache.get_seq_length() == 100


@pytest.mark.parametrize("length", [0, -1, 2.5, True, "100"])
def test_a_length_that_is_no_count_is_refused(llama: Any, length: Any) -> None:
    with pytest.raises(ConfigError, match="must be a positive number of tokens or None"):
        create_tiered_cache(llama, max_cache_len=length)


# --- configuration ---


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_sink": -1}, "n_sink"),
        ({"recent_window": -4}, "recent_window"),
        ({"policy": {"kind": "h2o", "budget": 0}}, "policy.budget"),
        ({"policy": {"kind": "h2o", "budget": -3}}, "policy.budget"),
        ({"policy": {"kind": "h2o", "budget": -0.5}}, "policy.budget"),
        ({"policy": {"kind": "h2o", "budget": 1.5}}, "policy.budget"),
        ({"policy": {"kind": "h2o", "budget": 30}}, "less than what always stays"),
        ({"policy": {"kind": "h2o", "every": 0}}, "policy.every"),
        ({"int4_budget": -400}, "int4_budget"),
        ({"int4_budget": 0, "int2_budget": 0}, "budget above 0"),
        ({"ladder": [{"tier": "int4", "capacity": 0}]}, "ladder.0"),
        ({"ladder": [{"tier": "int4", "capacity": -64}]}, "ladder.0"),
        ({"keys": {"kind": "uniform", "bits": 5}}, "bits=5 cannot be stored; choose one of 2, 3, 4, 8, 16"),
        ({"values": {"kind": "uniform", "bits": 0}}, "values"),
        ({"middle_k_bits": 7}, "bits=7"),
        ({"tile": 20}, "tile"),
        ({"recent_windw": 64}, "unknown field 'recent_windw'; did you mean 'recent_window'"),
        ({"policy": {"kind": "h2o", "budgt": 0.5}}, "unknown field 'budgt'; did you mean 'budget'"),
        ({"policy": {"kind": "h20"}}, "h2o"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite"),
        ({"attention": "flash"}, "attention"),
    ],
)
def test_a_configuration_that_cannot_work_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message) as found:
        FadeConfig(**fields)
    assert type(found.value).__module__.startswith("fade_core.")  # never pydantic's own


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.toml", "n_sink = = 4", "not valid TOML"),
        ("b.toml", "\x00\x01\x02 binary", "not valid TOML"),
        ("c.toml", "", "the file is empty"),
        ("d.toml", '{"n_sink": 4}', "not valid TOML"),
        ("e.yaml", "- 1\n- 2", "a table of fields is needed"),
        ("f.txt", "n_sink = 4", "names no format"),
        ("g.toml", "n_snk = 4", "unknown field 'n_snk'"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path: Path, name: str, text: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as found:
        FadeConfig.from_file(path)
    assert str(path) in str(found.value)
    with pytest.raises(ConfigError, match="no such file"):
        FadeConfig.from_file(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (4, "config must be a FadeConfig, its fields, a preset's name or a file; found int"),
        ("saef", "neither a preset nor a configuration file.*did you mean 'safe'"),
        ({"n_sinc": 4}, "n_sink"),
        ("missing.toml", "no such file"),
    ],
)
def test_a_configuration_that_is_none_is_refused(llama: Any, config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_tiered_cache(llama, config)


def test_a_configuration_may_be_named_or_written_as_a_table(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("n_sink = 7\n", encoding="utf-8")
    for config, wanted in (
        ("aggressive", FadeConfig.aggressive()),
        ({"n_sink": 7}, FadeConfig(n_sink=7)),
        (path, FadeConfig(n_sink=7)),
    ):
        with create_tiered_cache(llama, config) as cache:
            assert cache.config == wanted
    with create_tiered_cache(llama, "safe", n_sink=9) as cache:
        assert cache.config == FadeConfig(n_sink=9)


def test_a_layer_override_for_a_layer_that_is_not_there_leaves_the_model_alone(llama: Any) -> None:
    before = llama.config._attn_implementation
    with pytest.raises(ConfigError, match="layers '9' names no layer of this model, which has 3"):
        create_tiered_cache(llama, FadeConfig(layers={"9": {"n_sink": 1}}))
    assert llama.config._attn_implementation == before


# --- models ---


def mamba() -> Any:
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4))


def deepseek() -> Any:
    config = DeepseekV3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        first_k_dense_replace=2,
    )
    return DeepseekV3ForCausalLM(config)


def t5() -> Any:
    config = T5Config(vocab_size=64, d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config)


def all_sliding() -> Any:
    config = MistralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        sliding_window=8,
    )
    config.num_key_value_heads = 2
    return MistralForCausalLM(config)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (mamba, "MambaForCausalLM has no attention layers, so it has no KV cache to compress; generate without FADE"),
        (
            deepseek,
            "DeepseekV3ForCausalLM uses multi-head latent attention .kv_lora_rank=16.*Use transformers' Dynamic",
        ),
        (t5, "T5ForConditionalGeneration is an encoder-decoder model.*Use transformers' EncoderDecoderCache"),
        (all_sliding, "MistralForCausalLM has no full-attention layer"),
    ],
)
def test_a_model_that_has_nothing_to_compress_is_refused_by_name(build: Any, message: str) -> None:
    model = build()
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModelError, match=message):
        create_tiered_cache(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("model", ["gpt2", None, torch.nn.Linear(2, 2)])
def test_what_is_no_model_of_transformers_is_refused(model: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="PreTrainedModel"):
        create_tiered_cache(model)
