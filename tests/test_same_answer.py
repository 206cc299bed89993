"""``max_cache_len`` never changes an answer: with and without it, logits and what is stored are equal bit for bit."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from modes import MODES, tiny_task
from reference import stored
from serving import Request, Server
from test_modes import FAMILIES, LADDERS, PACKED, SHORT, evicted_by_padding, model_of
from test_per_head_budgets import CONFIGS as RAGGED
from tinymodels import fresh_seed, prompt, tiny
from torch import Tensor
from transformers import PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.errors import InputError, NonFiniteError
from fade_core.support.memory import live_bytes

TOKENS = {"kind": "uniform", "axis": "token"}
EVICTING = {
    "h2o, one tier": FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "h2o", "budget": 0.6, "every": 8}),
    "position, one tier": FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "position", "budget": 70, "every": 5}),
    "snapkv": FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "snapkv", "budget": 0.5, "every": 8}),
    "capacity": FadeConfig(**SHORT, ladder=[{"tier": "int4", "capacity": 48}], policy={"kind": "h2o", "every": 8}),
}
FULL = {
    "query moments": FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "expected_attention", "budget": 0.5, "every": 6}),
    "contiguous": FadeConfig(
        **SHORT, keys=TOKENS, reposition="contiguous", policy={"kind": "h2o", "budget": 0.5, "every": 8}
    ),
    "bytes": FadeConfig(**SHORT, keys=TOKENS, policy={"kind": "h2o", "budget": "116 KiB", "every": 8}),
}
CONFIGS = PACKED | LADDERS | EVICTING | {f"ragged {name}": config for name, config in RAGGED.items()} | FULL
EVICTS = [name for name, config in CONFIGS.items() if name in LADDERS or config.policy.budget is not None]
LENGTH = 300
MANY_ROWS = {"beam", "padded_beam", "contrastive", "rows_by_hand"}
"""Modes of more rows than the budget in bytes is for."""
CASES = [
    (family, [*CONFIGS][(5 * first + 3 * number + half * 7) % len(CONFIGS)], mode)
    for first, family in enumerate(FAMILIES)
    for number, mode in enumerate(MODES)
    for half in range(1 + (family == "llama"))
]
"""Each mode with four configurations, each configuration with four modes or more."""


def same_contents(ours: TieredKVCache, theirs: TieredKVCache) -> None:
    """Each token in the same tier with the same values, bit for bit, and the same statistics."""
    for cache in (ours, theirs):
        cache.settle()
    assert ours.get_seq_length() == theirs.get_seq_length()
    for mine, other in zip(ours.tiered, theirs.tiered, strict=True):
        found, wanted = stored(mine), stored(other)
        assert torch.equal(mine.held.tier_map(), other.held.tier_map())
        assert torch.equal(found.tier, wanted.tier)
        assert torch.equal(found.keys, wanted.keys)
        assert torch.equal(found.values, wanted.values)
        for name, held in statistics(mine).items():
            assert torch.equal(held, statistics(other)[name]), name


def statistics(layer: object) -> dict[str, Tensor]:
    """Each statistic at its tokens' positions, ``[B, H_kv, logical]``."""
    parts = [store for store in layer.held.stores if store.tiles]  # type: ignore[attr-defined]
    parts += [layer.held.window] if layer.held.window.longest else []  # type: ignore[attr-defined]
    found: dict[str, Tensor] = {}
    for part, held in zip(parts, layer.held.statistics(), strict=True):  # type: ignore[attr-defined]
        for name, values in held.items():
            shape = (*values.shape[:2], layer.logical + 1)  # type: ignore[attr-defined]
            where = part.live_positions().expand(*values.shape)
            where = where.where(where >= 0, shape[2] - 1)
            found.setdefault(name, torch.zeros(shape, dtype=values.dtype)).scatter_(2, where, values)
    return {name: values[..., :-1] for name, values in found.items()}


@pytest.mark.parametrize(("family", "name", "mode"), CASES)
def test_every_mode_says_the_same(family: str, name: str, mode: str) -> None:
    model, seed, found, config = model_of(family), fresh_seed(), [], CONFIGS[name]
    if name == "bytes" and mode in MANY_ROWS:
        config = config.with_overrides(policy={"kind": "h2o", "budget": "400 KiB", "every": 8})
    for length in (None, LENGTH):
        with create_tiered_cache(model, config, length) as cache:
            found.append((MODES[mode](tiny_task(model, seed), lambda padding, cache=cache: cache), cache))
    (wanted, growing), (ours, reserved) = found
    for tokens, others in zip(ours.tokens, wanted.tokens, strict=True):
        assert torch.equal(tokens, others)
    for step, (logits, others) in enumerate(zip(ours.logits, wanted.logits, strict=True)):
        assert torch.equal(logits, others), f"step {step}"
    same_contents(reserved, growing)
    assert reserved.memory_report().total == live_bytes(reserved)
    if name in EVICTS and name != "bytes":
        assert all(int((layer.held.tier_map() < 0).sum()) > evicted_by_padding(layer) for layer in reserved.tiered)


# --- by hand -----------------------------------------------------------------------------------------------------------


@functools.cache
def network(layers: int) -> PreTrainedModel:
    """One layer where a second would only do the same again."""
    return tiny("llama", fresh_seed(), num_hidden_layers=layers)


def shallow(name: str) -> FadeConfig:
    """A configuration for one layer: a budget in bytes is all layers'."""
    config = CONFIGS[name]
    return config.with_overrides(policy={"kind": "h2o", "budget": "58 KiB", "every": 8}) if name == "bytes" else config


@contextlib.contextmanager
def two(name: str, length: int = 164, steps: int = 3, layers: int = 1) -> Iterator[tuple[TieredKVCache, TieredKVCache]]:
    """A cache that grows and one that is reserved, both fed two rows."""
    config = shallow(name) if layers == 1 else CONFIGS[name]
    with contextlib.ExitStack() as stack:
        growing, reserved = (
            stack.enter_context(create_tiered_cache(network(layers), config, size)) for size in (None, LENGTH)
        )
        for cache in (growing, reserved):
            feed(cache, prompt(1, length, 2))
        go_on(growing, reserved, steps)
        yield growing, reserved


@torch.no_grad()
def feed(cache: TieredKVCache, ids: Tensor) -> Tensor:
    logits: Tensor = network(len(cache.layers))(ids, past_key_values=cache, use_cache=True).logits
    return logits


def go_on(growing: TieredKVCache, reserved: TieredKVCache, steps: int) -> None:
    """Steps of one token: equal logits, equal contents."""
    for step in range(steps):
        ids = prompt(90 + step, 1, growing.batch_size)
        assert torch.equal(feed(reserved, ids), feed(growing, ids)), f"step {step}"
    same_contents(reserved, growing)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_crop_through_packed_tiles(name: str) -> None:
    """What a crop leaves of a packed tile is neither decoded nor encoded again."""
    with two(name) as (growing, reserved):
        for count, steps in ((3, 5), (40, 18), (70, 5), (1, 3)):
            growing.crop(-count)
            reserved.crop(-count)
            go_on(growing, reserved, steps)
        for cache in (growing, reserved):
            cache.crop(-cache.get_seq_length())
            assert cache.get_seq_length() == 0
            feed(cache, prompt(3, 60, 2))
        go_on(growing, reserved, 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_beams(name: str) -> None:
    """Rows are repeated, chosen and reordered between steps; each goes on for itself."""
    with two(name, 124, 3) as (growing, reserved):
        for cache in (growing, reserved):
            cache.batch_repeat_interleave(3)
        go_on(growing, reserved, 8)
        for rows in ([5, 0, 0, 4, 4, 1], [1, 1, 1, 1, 0, 2], [3, 2]):
            for cache in (growing, reserved):
                cache.reorder_cache(torch.tensor(rows))
            go_on(growing, reserved, 5)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_that_join_and_leave(name: str) -> None:
    seed, said = fresh_seed(), []
    for length in (None, LENGTH):
        requests = [
            Request(prompt(seed + i, n)[0], w) for i, (n, w) in enumerate([(90, 20), (23, 28), (160, 9), (64, 9)])
        ]
        logits: list[Tensor] = []
        server = Server(network(1), shallow(name), length)
        hook = network(1).register_forward_hook(
            lambda module, inputs, output, logits=logits: logits.append(output.logits)
        )
        try:
            server.serve(list(requests), 3)
        finally:
            hook.remove()
        said.append(([request.said for request in requests], logits))
        server.cache.detach()
        server.spare.detach()
    assert said[0][0] == said[1][0]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(said[0][1], said[1][1], strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load(name: str, tmp_path: Path) -> None:
    """Each goes on in a cache of the other kind, and from a file."""
    with two(name) as (growing, reserved):
        growing.save(tmp_path / "growing.safetensors")
        reserved.save(tmp_path / "reserved.safetensors")
        states = growing.cache_state_dict(), reserved.cache_state_dict()
        go_on(growing, reserved, 9)
        with (
            create_tiered_cache(network(1), shallow(name)) as plain,
            create_tiered_cache(network(1), shallow(name), LENGTH) as roomy,
            TieredKVCache.load(tmp_path / "growing.safetensors", network(1)) as first,
            TieredKVCache.load(tmp_path / "reserved.safetensors", network(1)) as second,
        ):
            assert (first.get_max_length(), second.get_max_length()) == (-1, LENGTH)
            plain.load_cache_state_dict(states[1])
            roomy.load_cache_state_dict(states[0])
            for cache in (plain, roomy, first, second):
                for step in range(9):
                    feed(cache, prompt(90 + step, 1, 2))
                same_contents(cache, growing)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_that_fails_in_a_later_layer_never_happened(name: str) -> None:
    weight = network(2).model.layers[1].self_attn.k_proj.weight
    with two(name, 156, 3, layers=2) as (growing, reserved):
        kept = weight.data.clone()
        for turn in range(6):  # one of them hands a tile down, one is ranked
            weight.data[0, 0] = math.nan
            try:
                for cache in (growing, reserved):
                    with pytest.raises(NonFiniteError, match="The cache is as it was before this step"):
                        feed(cache, prompt(turn, 1 if turn % 3 else 40, 2))
            finally:
                weight.data.copy_(kept)
            go_on(growing, reserved, 2)


def test_a_later_prompt_of_any_length_is_taken_in() -> None:
    """Evicting caches hold little: 1,500 tokens at once pass through a reservation for what is kept."""
    config = CONFIGS["position, one tier"]
    model = network(2)
    with create_tiered_cache(model, config) as growing, create_tiered_cache(model, config, 9000) as reserved:
        for ids in (prompt(1, 3000, 2), prompt(3, 1500, 2)):
            assert torch.equal(feed(reserved, ids), feed(growing, ids))
        go_on(growing, reserved, 6)
        with create_tiered_cache(model, PACKED["token_keys"], 9000) as whole:
            feed(whole, prompt(1, 3000, 2))
            assert reserved.memory_report().total < 0.3 * whole.memory_report().total


def test_tokens_past_the_limit_are_refused_and_nothing_changes() -> None:
    with two("h2o, one tier", 150, 20) as (growing, reserved):
        with pytest.raises(InputError, match=f"would pass max_cache_len={LENGTH}"):
            feed(reserved, prompt(5, LENGTH - 169, 2))
        go_on(growing, reserved, 4)
