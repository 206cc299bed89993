"""Holes are counted row by row and head by head; each token carries how far it is moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import fresh_seed, give
from torch import Tensor

from fade_core.builtin.quantizers.uniform import UniformConfig
from fade_core.interfaces import QuantizerContext, RopeScheme, Tier
from fade_core.storage.repositioning import Shift, holes_after, note_shifts, shown_shifts
from fade_core.storage.slots import TokenLayout
from fade_core.storage.tier_store import TierStore, Tokens
from fade_core.storage.window import Window

DIM, TILE, HEADS = 16, 16, 2


class Adding(RopeScheme):
    """Adds the position to every channel: a shift can be read off the result."""

    kind = "adding"

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        positions = positions.reshape((1,) * (3 - positions.dim()) + tuple(positions.shape))
        return x + positions[..., None].to(x.dtype)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rotate(x, -positions)


def scattered(rows: int, heads: int, end: int, counts: tuple[int, ...]) -> list[Tensor]:
    """Positions of segments of ``counts`` slots: each row and head has some of ``range(end)`` once, in any slots."""
    total = sum(counts)
    found = torch.full((rows, heads, total), -1)
    for row in range(rows):
        for head in range(heads):
            live = int(torch.randint(0, total + 1, ()))
            found[row, head, torch.randperm(total)[:live]] = torch.randperm(end)[:live]
    return list(found.split(counts, 2))


@pytest.mark.parametrize("masked", [False, True])
def test_holes_are_the_positions_after_a_token_that_nobody_holds(masked: bool) -> None:
    torch.manual_seed(fresh_seed())
    end = 37
    parts = scattered(3, 2, end, (9, 1, 12))
    shown = torch.rand(3, end) < 0.6 if masked else None
    found = holes_after(parts, end, shown)
    stored = torch.cat(parts, 2)
    for part, holes in zip(parts, found, strict=True):
        assert holes.shape == part.shape
        for place in part.new_ones(part.shape).nonzero().tolist():
            row, head, slot = place
            at = int(part[row, head, slot])
            missing = set(range(at + 1, end)) - set(stored[row, head].tolist())
            if shown is not None:
                missing = {position for position in missing if bool(shown[row, position])}
            assert int(holes[row, head, slot]) == (0 if at < 0 else len(missing))


def test_heads_that_are_alike_are_counted_once() -> None:
    torch.manual_seed(fresh_seed())
    (part,) = scattered(2, 1, 50, (20,))
    (other,) = scattered(2, 3, 50, (7,))
    apart = other.masked_fill((other[..., None] == part[:, :, None]).any(-1), -1)
    assert [t.shape[1] for t in holes_after([part], 50)] == [1]
    mixed = holes_after([apart, part], 50)
    assert [t.shape[1] for t in mixed] == [3, 3]
    for head in range(3):
        alone = holes_after([apart[:, head : head + 1], part], 50)
        for ours, theirs in zip(mixed, alone, strict=True):
            assert torch.equal(ours[:, head : head + 1], theirs)


def layer(rows: int = 2) -> tuple[Window, TierStore]:
    """Three sinks and ten recent tokens around two tiles, of positions 0 to 44; room for three more."""
    quantizer = UniformConfig(bits=4, axis="token").build(QuantizerContext(DIM, tile=TILE))
    tier = Tier("int4", "rest", quantizer, quantizer)
    layout = TokenLayout(HEADS, torch.float32, torch.device("cpu"), shifted=True)
    window = Window(rows, DIM, DIM, 16, layout)
    for part in (range(3), range(35, 45)):
        give(window, torch.zeros(rows, HEADS, len(part), DIM), torch.zeros(rows, HEADS, len(part), DIM), part[0])
    store = TierStore(tier, rows, layout, True)
    keys = torch.randn(rows, HEADS, 2 * TILE, DIM)
    counts = torch.full((rows, HEADS), 2 * TILE)
    store.append(Tokens(keys, keys, torch.arange(3, 35).expand(rows, 1, -1), counts, {}))
    return window, store


def noted(window: Window, store: TierStore) -> tuple[Tensor, Tensor]:
    """How far packed and full-precision tokens are moved."""
    return store.note("shift"), window.note("shift")


def test_nothing_moves_while_nothing_is_missing() -> None:
    window, store = layer()
    note_shifts(window, [store], 45)
    assert not any(bool(part.any()) for part in noted(window, store))


def test_what_moves_is_what_lies_before_a_hole() -> None:
    window, store = layer()
    gone = torch.zeros(2, HEADS, 2 * TILE, dtype=torch.bool)
    gone[1, 0, 5:10] = True  # positions 8 to 12
    store.split(gone, decode=False)
    note_shifts(window, [store], 45)
    packed, full = noted(window, store)
    assert packed[..., :5].tolist() == [[[0] * 5] * 2, [[5] * 5, [0] * 5]]
    assert not packed[..., 5:].any()
    assert full[..., :3].tolist() == [[[0] * 3] * 2, [[5] * 3, [0] * 3]]
    assert not full[..., 3:].any()


def test_a_hidden_position_is_no_hole() -> None:
    window, store = layer()
    gone = torch.zeros(2, HEADS, 2 * TILE, dtype=torch.bool)
    gone[..., :TILE] = True  # positions 3 to 18
    store.split(gone, decode=False)
    shown = torch.ones(2, 45, dtype=torch.bool)
    shown[0, 3:9] = False
    packed, full = shown_shifts(Adding(), window, [store], 45, shown)
    assert packed is None
    assert full is not None
    assert full.offsets[:, 0, 0].tolist() == [TILE - 6, TILE]


def test_tokens_that_come_move_nothing_and_carry_nothing() -> None:
    window, store = layer()
    gone = torch.zeros(2, HEADS, 2 * TILE, dtype=torch.bool)
    gone[..., :TILE] = True
    store.split(gone, decode=False)
    note_shifts(window, [store], 45)
    before = [part.clone() for part in noted(window, store)]
    give(window, torch.zeros(2, HEADS, 1, DIM), torch.zeros(2, HEADS, 1, DIM), 45)
    packed, full = noted(window, store)
    assert torch.equal(packed, before[0])
    assert torch.equal(full[..., :-1], before[1])
    assert not full[..., -1].any()
    store.split(torch.ones(2, HEADS, TILE, dtype=torch.bool), decode=False)
    note_shifts(window, [store], 46)
    assert int(noted(window, store)[1].amax()) == 2 * TILE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moving_in_pieces_is_moving_at_once(dtype: Any) -> None:
    torch.manual_seed(fresh_seed())
    keys = torch.randint(-9, 9, (2, 3, 21, 4)).to(dtype)
    shift = Shift(Adding(), torch.randint(0, 9, (2, 3, 13), dtype=torch.int32))
    whole = shift.moved(keys)
    assert whole.dtype == dtype
    assert torch.equal(whole[:, :, 13:], keys[:, :, 13:])
    assert torch.equal(whole[:, :, :13], keys[:, :, :13] + shift.offsets[..., None].to(dtype))
    assert torch.equal(torch.cat([shift.moved(keys[:, :, :8]), shift.moved(keys[:, :, 8:], 8)], 2), whole)
    assert torch.equal(shift.moved(keys[:, :, 15:], 15), keys[:, :, 15:])
    for block in (1, 5, 13, 100):
        copy = keys.clone()
        shift.move(copy, block)
        assert torch.equal(copy, whole)
