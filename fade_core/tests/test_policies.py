"""The policies that the core brings, against their definitions computed token by token."""

from __future__ import annotations

import math

import pytest
import torch
from tiny import fresh_seed

from fade_core import EvictionPolicy, LayerView, get_policy
from fade_core.errors import ConfigError, InputError
from fade_core.eviction.attention_tracker import AttentionTracker

SHAPES = [(1, 1, 1, 1), (2, 3, 17, 5), (3, 2, 40, 40)]
"""Rows, KV heads, tokens, queries."""


def attention(shape: tuple[int, int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention of the newest queries: probabilities ``[B, H, Q, T]`` and what each query could see."""
    batch, heads, tokens, queries = shape
    generator = torch.Generator().manual_seed(seed)
    visible = torch.ones(tokens, tokens).tril().bool()[tokens - queries :]
    logits = 3 * torch.randn(batch, heads, queries, tokens, generator=generator)
    return logits.masked_fill(~visible, -torch.inf).softmax(-1), visible


def tracked(policy: EvictionPolicy, shape: tuple[int, int, int, int], seed: int) -> LayerView:
    """What the policy sees after the tracker has observed that attention, in two pieces."""
    batch, heads, tokens, queries = shape
    probabilities, visible = attention(shape, seed)
    tracker = AttentionTracker(policy.statistics, getattr(policy, "decay", 0.99), "all")
    held = {name: torch.zeros(batch, heads, tokens) for name in policy.statistics}
    for part in (slice(0, queries // 2), slice(queries // 2, queries)):
        if part.stop > part.start:
            tracker.observe(held, probabilities[:, :, part], visible[part])
    positions = torch.arange(tokens).expand(batch, heads, tokens)
    return LayerView(positions, tokens, statistics=held)


@pytest.mark.parametrize("shape", SHAPES)
def test_position_ranks_by_age_alone(shape: tuple[int, int, int, int]) -> None:
    policy = get_policy("position")
    assert (policy.positional, policy.statistics) == (True, ())
    batch, heads, tokens, _ = shape
    generator = torch.Generator().manual_seed(fresh_seed())
    positions = torch.stack([torch.randperm(10_000, generator=generator)[:tokens] for _ in range(batch * heads)])
    positions = positions.view(batch, heads, tokens)
    score = policy.score(LayerView(positions, 10_000))
    assert torch.equal(score.argsort(-1), positions.argsort(-1))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_h2o_is_the_attention_received_a_query_or_in_all(shape: tuple[int, int, int, int], normalised: bool) -> None:
    seed = fresh_seed()
    policy = get_policy("h2o", normalised=normalised)
    score = policy.score(tracked(policy, shape, seed))
    probabilities, visible = attention(shape, seed)
    for token in range(shape[2]):
        queries = [q for q in range(shape[3]) if visible[q, token]]
        total = sum(
            (probabilities[:, :, q, token].double() for q in queries), torch.zeros(shape[:2], dtype=torch.double)
        )
        expected = total / len(queries) if normalised and queries else total
        bound = 2 * shape[3] * torch.finfo(torch.float32).eps
        assert (score[..., token] - expected).abs().max() <= bound


def test_h2o_does_not_hold_it_against_a_token_that_it_is_new() -> None:
    mass = torch.tensor([[[8.0, 6.0, 1.5]]])
    seen = torch.tensor([[[16.0, 10.0, 2.0]]])
    view = LayerView(torch.arange(3).view(1, 1, 3), 16, statistics={"mass": mass, "seen": seen})
    assert get_policy("h2o").score(view).argsort(-1).tolist() == [[[0, 1, 2]]]
    assert get_policy("h2o", normalised=False).score(view).argsort(-1).tolist() == [[[2, 1, 0]]]


def test_a_token_that_no_query_could_see_is_worth_nothing() -> None:
    view = LayerView(
        torch.arange(2).view(1, 1, 2), 2, statistics={"mass": torch.zeros(1, 1, 2), "seen": torch.zeros(1, 1, 2)}
    )
    assert get_policy("h2o").score(view).tolist() == [[[0.0, 0.0]]]


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("shape", SHAPES)
def test_ema_is_the_decayed_attention(shape: tuple[int, int, int, int], decay: float) -> None:
    seed = fresh_seed()
    policy = get_policy("ema", decay=decay)
    score = policy.score(tracked(policy, shape, seed))
    probabilities, _ = attention(shape, seed)
    expected = torch.zeros(shape[:3], dtype=torch.double)
    for query in range(shape[3]):
        expected = decay * expected + probabilities[:, :, query].double()
    assert (score - expected).abs().max() <= 8 * shape[3] * torch.finfo(torch.float32).eps


def test_ema_forgets_by_half_after_its_half_life() -> None:
    policy = get_policy("ema", decay=0.9)
    tracker = AttentionTracker(policy.statistics, 0.9, "all")
    held = {"ema": torch.zeros(1, 1, 1)}
    tracker.observe(held, torch.ones(1, 1, 1, 1))
    start = held["ema"].item()
    queries = math.ceil(math.log(0.5) / math.log(0.9))
    for _ in range(queries):
        tracker.observe(held, torch.zeros(1, 1, 1, 1))
    assert held["ema"].item() <= start / 2
    assert held["ema"].item() >= start / 2 * 0.9


@pytest.mark.parametrize(
    ("kind", "options", "fragment"),
    [
        ("ema", {"decay": 1.0}, "decay"),
        ("ema", {"decay": 0}, "decay"),
        ("ema", {"decay": float("nan")}, "decay"),
        ("h2o", {"normalised": "perhaps"}, "normalised"),
        ("h2o", {"budget": 0}, "budget"),
        ("position", {"every": 0}, "every"),
        ("position", {"decay": 0.5}, "unknown field 'decay'"),
    ],
)
def test_options_that_cannot_work_are_refused(kind: str, options: dict[str, object], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        get_policy(kind, **options)


@pytest.mark.parametrize("kind", ["h2o", "ema"])
def test_a_statistic_that_is_not_tracked_is_named(kind: str) -> None:
    policy = get_policy(kind)
    with pytest.raises(InputError, match=f"'{policy.statistics[0]}' is not tracked"):
        policy.score(LayerView(torch.zeros(1, 1, 1, dtype=torch.long), 1))
