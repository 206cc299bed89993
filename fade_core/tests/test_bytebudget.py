"""Budgets in bytes against what caches really hold, and budgets that differ by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import fresh_seed, tiny_llama

from fade_core import FadeConfig, create_tiered_cache
from fade_core.errors import ConfigError, InputError
from fade_core.eviction.byte_budget import layer_budgets
from fade_core.support.memory import live_bytes
from fade_core.support.validation import bytes_of

LAYERS = 3
SHORT = {"n_sink": 2, "recent_window": 16, "tile": 16}
LADDERS: dict[str, dict[str, Any]] = {
    "exact": {"ladder": [{"tier": "fp16"}]},
    "tokens": {"keys": {"kind": "uniform", "axis": "token"}},
    "tiles": {"keys": {"kind": "uniform", "axis": "channel"}},
    "two": {
        "keys": {"kind": "uniform", "axis": "token"},
        "ladder": [{"tier": "int4", "capacity": 64}, {"tier": "int2"}],
    },
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(layers=LAYERS)


@pytest.fixture(scope="module")
def shallow() -> Any:
    """Two layers, to share a budget equally."""
    return tiny_llama(layers=2)


def text(rows: int, length: int) -> torch.Tensor:
    return torch.randint(1, 255, (rows, length), generator=torch.Generator().manual_seed(fresh_seed()))


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("policy", ["position", "h2o"])
@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("max_cache_len", [None, 500])
def test_a_cache_never_holds_more_and_little_less(
    shallow: Any, ladder: str, policy: str, rows: int, max_cache_len: int | None
) -> None:
    """After the prompt and after each of the steps that follow; once it is full, most of the bytes are used."""
    ids, prompt = text(rows, 350), 330  # tiles fill and tokens are ranked twice in twenty steps
    budget = (100_000 if ladder == "exact" else 24_000) * 2 * rows
    config = FadeConfig(**SHORT, **LADDERS[ladder], policy={"kind": policy, "budget": f"{budget}B", "every": 8})
    held = []
    with create_tiered_cache(shallow, config, max_cache_len) as cache, torch.no_grad():
        for start, end in [(0, prompt), *((i, i + 1) for i in range(prompt, 350))]:
            shallow(ids[:, start:end], past_key_values=cache)
            held.append(live_bytes(cache, exclude=shallow))
        assert cache.memory_report().total == held[-1]
        assert all(bool((layer.held.tier_map() < 0).any()) for layer in cache.tiered)
    reserved = max_cache_len is not None and ladder == "two"  # what is demoted at a ranking has room of its own
    assert max(held) <= budget * (1.15 if reserved else 1)
    assert held[-1] >= 0.8 * budget


@pytest.mark.parametrize(
    ("text_", "nbytes"),
    [("512MiB", 512 * 2**20), ("1.5 GB", 1_500_000_000), (" 3KiB ", 3072), ("7B", 7), ("0.5KB", 500)],
)
def test_bytes_are_read(text_: str, nbytes: int) -> None:
    assert bytes_of(text_) == nbytes


@pytest.mark.parametrize("wrong", ["512", "5TB", "-1MB", "0B", "MiB", "1,5GB", "0.1B", "1 Mb"])
def test_what_is_not_bytes_is_refused(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"policy\.budget: bytes are written like"):
        FadeConfig(policy={"kind": "h2o", "budget": wrong})


def test_a_budget_that_does_not_hold_the_window_is_refused(model: Any) -> None:
    config = FadeConfig(**SHORT, policy={"kind": "h2o", "budget": "9KiB"})
    with pytest.raises(ConfigError, match=r"layer 0: sinks and recent window of 1 row take [\d,]+ bytes"):
        create_tiered_cache(model, config=config)
    config = config.with_overrides(policy={"budget": "200KB"})
    with create_tiered_cache(model, config=config) as cache, torch.no_grad():
        with pytest.raises(InputError, match="layer 0: sinks and recent window of 9 rows take"):
            model(text(9, 40), past_key_values=cache)
        model(text(1, 40), past_key_values=cache)
        assert cache.get_seq_length() == 40


def test_a_pyramid_falls_in_a_line_and_keeps_the_mean() -> None:
    policy = FadeConfig(policy={"kind": "h2o", "budget": 300, "schedule": {"kind": "pyramid", "ratio": 3}}).policy
    assert layer_budgets(policy, 5) == [450, 375, 300, 225, 150]
    assert layer_budgets(policy, 1) == [300]
    flat = FadeConfig(policy={"kind": "h2o", "budget": 0.4}).policy
    assert layer_budgets(flat, 3) == [0.4] * 3
    assert layer_budgets(FadeConfig(policy={"kind": "h2o"}).policy, 2) == [None, None]


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("ratio", [1.0, 2.0, 9.0])
def test_no_layer_is_given_more_than_there_is(budget: float, ratio: float) -> None:
    policy = FadeConfig(policy={"kind": "h2o", "budget": budget, "schedule": {"ratio": ratio}}).policy
    shares = [share for share in layer_budgets(policy, 30) if share is not None]
    assert max(shares) <= 1
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) / 30 == pytest.approx(budget)


@pytest.mark.parametrize("budget", [120, 0.4, "400KB"])
def test_layers_keep_what_the_schedule_gives_them(model: Any, budget: Any) -> None:
    ids = text(2, 400)
    policy = {"kind": "h2o", "budget": budget, "schedule": {"kind": "pyramid", "ratio": 3.0}}
    config = FadeConfig(**SHORT, ladder=[{"tier": "fp16"}], policy=policy)
    with create_tiered_cache(model, config=config) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        kept = [int((layer.held.tier_map()[0, 0] >= 0).sum()) for layer in cache.tiered]
        held = live_bytes(cache, exclude=model)
    if isinstance(budget, str):
        assert kept[0] > kept[1] > kept[2]
        assert held <= bytes_of(budget)
    else:
        mean = budget if isinstance(budget, int) else 400 * budget
        for tokens, weight in zip(kept, (1.5, 1.0, 0.5), strict=True):
            assert mean * weight - 16 < tokens <= mean * weight


def test_a_schedule_that_starves_a_layer_is_refused(model: Any) -> None:
    policy = {"kind": "h2o", "budget": 30, "schedule": {"kind": "pyramid", "ratio": 4.0}}
    with pytest.raises(ConfigError, match="leaves layer 2 12 tokens, fewer than n_sink and recent_window keep"):
        create_tiered_cache(model, config=FadeConfig(**SHORT, policy=policy))
    with pytest.raises(ConfigError, match=r"write policy\.budget as well"):
        FadeConfig(policy={"kind": "h2o", "schedule": {"kind": "pyramid"}})
