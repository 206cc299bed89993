"""Attention statistics against loops over queries."""

from __future__ import annotations

import pytest
import torch
from tiny import fresh_seed
from torch import Tensor

from fade_core.errors import ConfigError
from fade_core.eviction.attention_tracker import STATISTICS, AttentionTracker

B, H, Q, T = 2, 3, 7, 11


@pytest.fixture
def probabilities() -> Tensor:
    torch.manual_seed(fresh_seed())
    return torch.randn(B, H, Q, T).softmax(-1)


def zeros() -> dict[str, Tensor]:
    return {name: torch.zeros(B, H, T) for name in STATISTICS}


def test_statistics_are_what_their_names_say(probabilities: Tensor) -> None:
    visible = torch.rand(B, 1, Q, T) < 0.6
    held = zeros()
    AttentionTracker(STATISTICS, decay=0.9).observe(held, probabilities, visible)
    mass, ema, seen = torch.zeros(3, B, H, T, dtype=torch.float64)
    for query in range(Q):
        given = probabilities[:, :, query].double()
        mass, ema, seen = mass + given, 0.9 * ema + given, seen + visible[:, :, query]
    torch.testing.assert_close(held["mass"].double(), mass, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(held["ema"].double(), ema, rtol=1e-5, atol=1e-6)
    assert torch.equal(held["seen"].double(), seen)
    assert torch.equal(held["last"], probabilities[:, :, -1])


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_two_calls_are_one(probabilities: Tensor, cut: int) -> None:
    tracker = AttentionTracker(STATISTICS, decay=0.8)
    together, apart = zeros(), zeros()
    tracker.observe(together, probabilities)
    tracker.observe(apart, probabilities[:, :, :cut])
    tracker.observe(apart, probabilities[:, :, cut:])
    for name in STATISTICS:
        torch.testing.assert_close(apart[name], together[name], rtol=1e-5, atol=1e-6)
    assert bool((together["seen"] == Q).all())


def test_statistics_are_updated_in_place_and_only_those_that_are_held(probabilities: Tensor) -> None:
    buffer = torch.zeros(B, H, 2 * T)
    AttentionTracker(("mass",)).observe({"mass": buffer[..., :T]}, probabilities)
    assert torch.equal(buffer[..., :T], probabilities.sum(2))
    assert not bool(buffer[..., T:].any())


def test_the_observation_window_is_the_last_queries() -> None:
    assert AttentionTracker(observation_window=5).observed(3) == 3
    assert AttentionTracker(observation_window=5).observed(9) == 5
    assert AttentionTracker(observation_window="all").observed(900) == 900
    assert AttentionTracker(()).active is False
    assert AttentionTracker(("ema",)).active is True


@pytest.mark.parametrize("passes", [(30,), (8,), (7,), (1, 1, 1), (30, 2, 1, 9), (3, 8, 2)])
def test_the_window_is_that_of_the_latest_queries_and_leaks(passes: tuple[int, ...]) -> None:
    torch.manual_seed(fresh_seed())
    tracker, length = AttentionTracker(("window",), observation_window=8), 8
    held, wanted = {"window": torch.zeros(B, H, T)}, torch.zeros(B, H, T, dtype=torch.float64)
    for queries in passes:
        given = torch.rand(B, H, queries, T)
        tracker.age(held, queries)
        tracker.observe(held, given[:, :, -tracker.observed(queries) :])
        wanted *= 0 if queries >= length else (1 - 1 / length) ** queries
        wanted += given[:, :, -length:].double().sum(2)
    torch.testing.assert_close(held["window"].double(), wanted, rtol=1e-5, atol=1e-6)


def test_a_rereading_keeps_the_most_that_was_given(probabilities: Tensor) -> None:
    tracker = AttentionTracker(("reread",))
    assert not tracker.active
    held = {"reread": torch.zeros(B, H, T)}
    tracker.observe(held, probabilities)
    assert not bool(held["reread"].any())
    probabilities[:, :, :, 2] = 0
    for queries in probabilities.split(3, dim=2):
        tracker.observe_rereading(held, queries)
    assert torch.equal(held["reread"][..., 3:], probabilities.amax(2)[..., 3:])
    assert bool((held["reread"][..., 2] > 0).all())  # read, if only by nobody


def test_a_window_of_all_queries_never_leaks() -> None:
    tracker = AttentionTracker(("window",), observation_window="all")
    assert tracker.keeps(1) == tracker.keeps(10**6) == 1


def test_statistics_of_tokens_and_of_queries_are_told_apart() -> None:
    tracker = AttentionTracker(("query_mean", "mass", "query_covariance"))
    assert (tracker.statistics, tracker.query_statistics) == (("mass",), ("query_mean", "query_covariance"))
    assert not AttentionTracker(("query_mean",)).active


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"statistics": ("mass", "norm")},
            r"unknown statistics \['norm'\]; the tracker keeps mass, seen, ema, last, window, reread, query_mean",
        ),
        ({"decay": 0.0}, "decay=0.0 must lie in"),
        ({"decay": 1.5}, "decay=1.5 must lie in"),
    ],
)
def test_what_cannot_be_tracked_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttentionTracker(**arguments)  # type: ignore[arg-type]
