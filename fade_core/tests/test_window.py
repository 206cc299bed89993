"""The full-precision window against lists of tokens, with large numbers in every slot that is not in use."""

from __future__ import annotations

import random

import pytest
import torch
from tiny import fresh_seed, give, take_out
from torch import Tensor

from fade_core.storage.slots import TokenLayout
from fade_core.storage.window import Window
from fade_core.support.memory import live_bytes

HEADS, KEY, VALUE = 2, 4, 6

Rows = list[list[tuple[int, Tensor, Tensor, Tensor]]]
"""Row, slot: position, key ``[H, D]``, value and statistic ``[H]``."""


def window_of(batch: int, capacity: int = 12) -> Window:
    return Window(batch, KEY, VALUE, capacity, TokenLayout(HEADS, torch.float32, torch.device("cpu"), ("mass",)))


def content(window: Window) -> Rows:
    keys, values = (t.clone() for t in (window.decode(0), window.decode(1)))
    positions, mass = window.live_positions()[:, 0], window.statistics["mass"].clone()
    return [
        [(int(positions[b, i]), keys[b, :, i], values[b, :, i], mass[b, :, i]) for i in range(int(window.lengths[b]))]
        for b in range(keys.shape[0])
    ]


def poison(window: Window) -> None:
    """Large numbers into the slack that no row reaches: buffers begin as zeros, and only finite numbers are written."""
    for held in (window.keys, window.values, window.slots["statistic.mass"]):
        held[:, :, window.longest :] = 1e30


def assert_same(window: Window, rows: Rows) -> None:
    assert all(
        bool(torch.isfinite(held).all()) for held in (window.decode(0), window.decode(1))
    )  # shorter rows too: weight 0 times NaN is NaN
    assert window.lengths.tolist() == [len(row) for row in rows]
    assert window.longest == max(len(row) for row in rows)
    live = torch.arange(window.longest) < window.lengths[:, None]
    assert torch.equal(window.live_positions()[:, 0] >= 0, live)
    assert bool((window.positions[:, window.longest :] == -1).all())
    for found, row in zip(content(window), rows, strict=True):
        for (position, *got), (wanted, *tensors) in zip(found, row, strict=True):
            assert position == wanted
            assert all(torch.equal(a, b) for a, b in zip(got, tensors, strict=True))


def append(window: Window, rows: Rows, position: int, count: int) -> None:
    """The same new tokens for the window and for the lists."""
    keys, values = torch.randn(len(rows), HEADS, count, KEY), torch.randn(len(rows), HEADS, count, VALUE)
    give(window, keys, values, position)
    for b, row in enumerate(rows):
        row += [(position + i, keys[b, :, i], values[b, :, i], torch.zeros(HEADS)) for i in range(count)]


def other_window(dice: random.Random, position: int) -> Window:
    """Two rows, one of which may be shorter, or empty."""
    window, count = window_of(2, dice.choice([3, 12, 30])), dice.randint(0, 30)
    if count:
        give(window, torch.randn(2, HEADS, count, KEY), torch.randn(2, HEADS, count, VALUE), position)
        window.statistics["mass"][:, :, :count] = torch.rand(2, HEADS, count)
        take_out(window, 0, torch.tensor([0, dice.randint(0, count)]))
    return window


def shifted(dice: random.Random, rows: Rows) -> tuple[int, Rows]:
    """Rows whose positions are all a few further on or back, and by how many."""
    by = dice.randint(-min([token[0] for row in rows for token in row], default=0), 9)
    return by, [[(p + by, k, v, m) for p, k, v, m in row] for row in rows]


@pytest.mark.parametrize("trial", range(6))
def test_any_history_keeps_exactly_the_tokens_it_should(trial: int) -> None:
    seed = fresh_seed() + trial
    torch.manual_seed(seed)
    dice = random.Random(seed)
    window, batch, position = window_of(3), 3, 0
    rows: Rows = [[] for _ in range(batch)]
    for _ in range(40):
        poison(window)
        action = dice.choice(
            ["append", "append", "append", "take", "crop", "rows", "shrink", "mass", "load", "join", "shift"]
        )
        if action == "append":
            count = dice.randint(1, 7)
            append(window, rows, position, count)
            position += count
        elif action == "take" and window.longest:
            start = dice.randint(0, min(4, int(window.lengths.min())))
            counts = torch.tensor([dice.randint(0, len(row) - start) for row in rows])
            if dice.random() < 0.5:
                counts = counts.clamp_max(int(counts.min()))
            take_out(window, start, counts)
            rows = [row[:start] + row[start + int(n) :] for row, n in zip(rows, counts, strict=True)]
        elif action == "crop":
            position = dice.randint(max(0, position - 5), position)
            window.crop(position)
            rows = [[token for token in row if token[0] < position] for row in rows]
        elif action == "rows":
            index = torch.randint(0, batch, (dice.randint(1, 4),))
            window.select_rows(index)
            rows, batch = [list(rows[i]) for i in index.tolist()], len(index)
        elif action == "join":
            other = other_window(dice, position)
            position, batch = position + other.longest, batch + 2
            rows += content(other)
            poison(other)
            window.join(other)
        elif action == "shift":
            by, rows = shifted(dice, rows)
            window.shift(by)
            position += by
        elif action == "shrink":
            window.shrink(12)
            assert window.capacity == max(12, window.longest)
        elif action == "mass":
            live = torch.arange(window.longest) < window.lengths[:, None]
            window.statistics["mass"][:, :, : window.longest] += live[:, None]
            rows = [[(p, k, v, m + 1) for p, k, v, m in row] for row in rows]
        elif action == "load":
            state = window.state()
            assert all(bool(torch.isfinite(t).all()) for t in state.values() if t.is_floating_point())
            window = window_of(batch)
            tokens = {
                "positions": state["positions"][:, None],
                **{n: state[n] for n in ("keys", "values", "statistic.mass")},
            }
            window.assign(tokens, state["lengths"])
            assert window.capacity == max(12, window.longest)
        poison(window)
        assert_same(window, rows)


def test_restoring_undoes_everything_since_the_snapshot() -> None:
    torch.manual_seed(fresh_seed())
    window = window_of(2)
    give(window, torch.randn(2, HEADS, 9, KEY), torch.randn(2, HEADS, 9, VALUE), 0)
    take_out(window, 1, torch.tensor([0, 4]))
    before = {name: tensor.clone() for name, tensor in window.state().items()}
    for change in range(4):
        restore = window.snapshot()
        window.statistics["mass"].add_(1)
        if change != 0:
            give(window, torch.randn(2, HEADS, 20, KEY), torch.randn(2, HEADS, 20, VALUE), 9)
        if change == 2:
            take_out(window, 2, torch.tensor([3, 1]))
        if change == 3:
            keys, values = torch.ones(2, 2, HEADS, 3, 1)
            window.assign({"keys": keys, "values": values, "positions": torch.zeros(2, 1, 3)}, torch.tensor([2, 3]))
        restore()
        after = window.state()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        assert window.live_positions().shape == (2, 1, 9)


def test_what_it_gives_back_is_freed() -> None:
    window = window_of(1, 40)
    give(window, torch.randn(1, HEADS, 40, KEY), torch.randn(1, HEADS, 40, VALUE), 0)
    take_out(window, 0, torch.tensor([30]))
    window.shrink(12)
    assert window.lengths.tolist() == [10]
    assert live_bytes(window) == sum(t.nbytes for t in window.tensors().values())
    assert window.tensors()["keys"].shape[2] == 12


def test_it_grows_by_little() -> None:
    window = window_of(1, 64)
    for position in range(300):
        give(window, torch.zeros(1, HEADS, 1, KEY), torch.zeros(1, HEADS, 1, VALUE), position)
    assert window.longest == 300
    assert window.capacity <= 300 * 17 / 16
