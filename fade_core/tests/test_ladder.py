"""Capacities: who takes how much, who gives up how much, and which tokens those are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fade_core.builtin.quantizers.full import FullQuantizer
from fade_core.eviction.ladder import UNBOUNDED, Ladder, describe, in_tiles, lowest, tokens_of, whole
from fade_core.interfaces import Tier
from fade_core.support.validation import Capacity

CAPACITIES = st.one_of(st.integers(1, 400), st.floats(0.01, 1.0), st.just("rest"))
BUDGETS = st.one_of(st.none(), st.integers(20, 500), st.floats(0.05, 1.0))
ROWS = st.lists(st.tuples(st.integers(0, 600), st.integers(0, 60)), min_size=1, max_size=4)
"""Packed and full-precision tokens of each row."""


def ladder_of(capacities: list[Capacity], budget: float | None, tile: int = 16) -> Ladder:
    full = FullQuantizer(8, tile)
    tiers = tuple(Tier(f"t{i}", capacity, full, full) for i, capacity in enumerate(capacities))
    return Ladder(tiers, n_sink=4, recent_window=16, budget=budget, tile=tile)


def allowed(capacity: Capacity, length: int) -> int:
    if capacity == "rest":
        return UNBOUNDED
    return int(length * capacity) if isinstance(capacity, float) else capacity


@settings(max_examples=200, deadline=None)
@given(st.lists(CAPACITIES, min_size=1, max_size=3), BUDGETS, ROWS)
def test_a_prompt_is_poured_into_whole_tiles_from_the_top(
    capacities: list[Capacity], budget: float | None, rows: list[tuple[int, int]]
) -> None:
    ladder = ladder_of(capacities, budget)
    available = torch.tensor([packed // 16 * 16 for packed, _ in rows])
    window = torch.tensor([kept for _, kept in rows])
    lengths = available + window
    takes = ladder.fill(available, lengths, window)
    for row in range(len(rows)):
        length, left = int(lengths[row]), int(available[row])
        room = max(0, allowed(budget, length) - int(window[row])) if budget is not None else UNBOUNDED
        for capacity, take in zip(capacities, takes, strict=True):
            expected = min(left, room // 16 * 16, allowed(capacity, length) // 16 * 16)
            assert int(take[row]) == expected
            left, room = left - expected, room - expected


@settings(max_examples=200, deadline=None)
@given(st.lists(CAPACITIES, min_size=1, max_size=3), BUDGETS, ROWS, st.integers(0, 300), st.data())
def test_a_tier_gives_up_the_fewest_tiles_that_bring_it_within_its_room(
    capacities: list[Capacity], budget: float | None, rows: list[tuple[int, int]], above: int, data: st.DataObject
) -> None:
    ladder = ladder_of(capacities, budget)
    index = data.draw(st.integers(0, len(capacities) - 1))
    held = torch.tensor([[packed, packed // 2] for packed, _ in rows])
    window = torch.tensor([kept for _, kept in rows])
    lengths = held.amax(1) + window + above
    over = ladder.overflow(held, index, torch.full_like(held, above), lengths, window)
    for row in range(len(rows)):
        length = int(lengths[row])
        room = allowed(capacities[index], length)
        if budget is not None:
            room = min(room, max(0, allowed(budget, length) - int(window[row]) - above))
        for head in range(2):
            tokens, gone = int(held[row, head]), int(over[row, head])
            assert gone % 16 == 0 or gone == tokens
            assert tokens - gone <= room
            assert gone == 0 or tokens - gone + 16 > room


@settings(max_examples=200, deadline=None)
@given(st.lists(CAPACITIES, min_size=1, max_size=3), st.integers(0, 2**31), st.booleans())
def test_heads_with_more_room_have_more_of_every_tier(capacities: list[Capacity], seed: int, poured: bool) -> None:
    ladder, heads = ladder_of(capacities, budget=0.5), 3
    torch.manual_seed(seed)
    room = torch.randint(0, 12, (2, heads)) * 16
    held = room + torch.randint(0, 4, (2, heads)) * 16
    window, lengths = torch.tensor([20, 31]), torch.tensor([300, 90])
    above = torch.zeros_like(held)
    takes = ladder.fill(held, lengths, window, room) if poured else []
    for index, capacity in enumerate(capacities):
        if poured:
            kept = takes[index]
        else:
            kept = held - ladder.overflow(held, index, above, lengths, window, room)
        for row in range(2):
            whole_row = max(1, int(room[row].sum()))
            for head in range(heads):
                dealt = allowed(capacity, int(lengths[row])) * heads * int(room[row, head]) // whole_row
                most = min(int(held[row, head]), dealt, max(0, int(room[row, head] - above[row, head])))
                if not poured:
                    assert most - 16 < int(kept[row, head]) <= most
                else:
                    assert int(kept[row, head]) == most // 16 * 16
        above = above + kept
        held = held - kept


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), min_size=1, max_size=6))
def test_what_heads_are_given_is_rounded_to_tiles_and_its_sum_kept(heads: list[tuple[int, int]]) -> None:
    wanted, held = (torch.tensor([[pair[i] for pair in heads]]) for i in (0, 1))
    tiled = in_tiles(wanted, held // 16 * 16, 16)
    meant = torch.minimum(wanted, held // 16 * 16)
    assert bool((tiled % 16 == 0).all())
    assert bool(((tiled - meant).abs() < 16).all())
    assert int(tiled.sum()) == int(meant.sum()) // 16 * 16


def test_a_cropped_tile_is_not_counted_as_whole() -> None:
    assert in_tiles(torch.tensor([[21, 43]]), torch.tensor([[21, 64]]), 16).tolist() == [[16, 48]]
    assert in_tiles(torch.tensor([[21, 43]]), torch.tensor([[21, 43]]), 16).tolist() == [[16, 43]]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.booleans())
def test_the_lowest_scores_go_and_of_equals_the_older(seed: int, tokens: int, ties: bool) -> None:
    torch.manual_seed(seed)
    scores = torch.randint(0, 4, (2, 3, tokens)).float() if ties else torch.randn(2, 3, tokens)
    live = torch.rand(2, 3, tokens) < 0.7
    count = (live.sum(-1) * torch.rand(2, 3)).long()
    found = lowest(scores, live, count)
    for b in range(2):
        for h in range(3):
            slots = [slot for slot in range(tokens) if live[b, h, slot]]
            slots.sort(key=lambda slot: (float(scores[b, h, slot]), slot))
            assert found[b, h].nonzero().flatten().tolist() == sorted(slots[: int(count[b, h])])


def test_scores_of_minus_infinity_go_before_all_others_and_only_live_tokens_go() -> None:
    scores = torch.tensor([[[1.0, -torch.inf, 0.0, -torch.inf]]])
    live = torch.tensor([[[True, True, True, False]]])
    assert lowest(scores, live, torch.tensor([[1]]))[0, 0].tolist() == [False, True, False, False]
    assert lowest(scores, live, torch.tensor([[3]]))[0, 0].tolist() == [True, True, True, False]


def test_capacities_as_tokens() -> None:
    lengths = torch.tensor([0, 10, 101])
    assert tokens_of(7, lengths).tolist() == [7, 7, 7]
    assert tokens_of(0.5, lengths).tolist() == [0, 5, 50]
    assert tokens_of(1.0, lengths).tolist() == [0, 10, 101]
    assert tokens_of("rest", lengths).tolist() == [UNBOUNDED] * 3
    assert whole(torch.tensor([0, 15, 16, 47, UNBOUNDED]), 16).tolist() == [0, 0, 16, 32, UNBOUNDED]


@pytest.mark.parametrize(
    ("capacities", "budget", "bounded"),
    [(["rest"], None, False), (["rest"], 100, True), ([0.5, "rest"], None, True), ([64], None, True)],
)
def test_a_ladder_is_bounded_where_a_token_can_move_on(
    capacities: list[Capacity], budget: int | None, bounded: bool
) -> None:
    assert ladder_of(capacities, budget).bounded is bounded


def test_a_ladder_describes_itself() -> None:
    assert describe(ladder_of([0.5, "rest"], None).tiers) == "t0(K 16.00 V 16.00) 0.5 > t1(K 16.00 V 16.00) rest"
