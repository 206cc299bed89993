"""The store of one tier against a plain book of who holds which token, under random histories of every operation."""

from __future__ import annotations

import random
from typing import Any, ClassVar

import pytest
import torch
from tiny import fresh_seed
from torch import Tensor

from fade_core.builtin.quantizers.full import FullQuantizer
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.cache.layer_state import load_store, store_state
from fade_core.interfaces import Kernel, Op, Quantizer, Support, Tier
from fade_core.packed import Tiles
from fade_core.storage.codec import Codec, put
from fade_core.storage.slots import TokenLayout
from fade_core.storage.tier_store import TierStore, Tokens
from fade_core.support.memory import live_bytes

TILE, DIM = 16, 8
CPU = torch.device("cpu")

Content = list[list[dict[int, tuple[Tensor, Tensor, float]]]]
"""Row, head, position: key, value and statistic."""


def tier(kind: str) -> Tier:
    """Full precision, tokens that move one by one ("token"), or keys that move by the tile ("channel")."""
    if kind == "full":
        return Tier("fp16", "rest", FullQuantizer(DIM, TILE), FullQuantizer(DIM, TILE))
    axis = "token" if kind == "token" else "channel"
    keys: Quantizer = UniformQuantizer(DIM, 4, axis, tile=TILE)  # type: ignore[arg-type]
    return Tier("int4", "rest", keys, UniformQuantizer(DIM, 4, "token", tile=TILE, layout="channel"))


def store_of(kind: str, batch: int = 2, heads: int = 3, stores_positions: bool = False, fixed: int = 0) -> TierStore:
    layout = TokenLayout(heads, torch.float32, CPU, ("mass",))
    return TierStore(tier(kind), batch, layout, stores_positions, fixed=fixed)


def content(store: TierStore) -> Content:
    """Everything the store holds."""
    batch, heads = store.table.live_ids().shape[:2]
    found: Content = [[{} for _ in range(heads)] for _ in range(batch)]
    if not store.tiles:
        return found
    keys, values = (t.clone() for t in (store.decode(0), store.decode(1)))  # full precision is read in place
    positions, mass = store.live_positions(), store.statistics["mass"]
    for b in range(batch):
        for h in range(heads):
            for slot, position in enumerate(positions[b, h].tolist()):
                if position >= 0:
                    assert position not in found[b][h], "a position is stored twice"
                    found[b][h][position] = (keys[b, h, slot], values[b, h, slot], float(mass[b, h, slot]))
    return found


def assert_same(found: Content, expected: Content) -> None:
    for b, row in enumerate(expected):
        for h, tokens in enumerate(row):
            assert found[b][h].keys() == tokens.keys(), (b, h)
            for position, (key, value, mass) in tokens.items():
                got = found[b][h][position]
                assert torch.equal(got[0], key), (b, h, position)
                assert torch.equal(got[1], value), (b, h, position)
                assert got[2] == mass


def assert_consistent(store: TierStore) -> None:
    """What every other part of the cache relies on."""
    positions = store.live_positions().unflatten(-1, (-1, TILE)) if store.tiles else torch.empty(0, dtype=torch.long)
    for tiles in positions.reshape(-1, TILE) if store.tiles else ():
        live = tiles[tiles >= 0]
        assert torch.equal(tiles[: len(live)], live), "live tokens come first in a tile"
        assert bool((live.diff() > 0).all()), "positions ascend within a tile"
    live_ids = store.table.live_ids()[store.table.live_ids() >= 0]
    assert bool((live_ids < store.pool.capacity).all())
    assert torch.equal(store.table.live_ids() >= 0, store.table.live_counts() > 0)
    if store.tiles:
        assert bool((store.table.live_ids() >= 0).any(0).any(0)[-1]), "no column of the table is empty"
    valid = store.view().valid()
    assert torch.equal(store.lengths, store.table.live_counts().sum(-1) if valid is None else valid.sum(-1))


def poison(store: TierStore) -> None:
    """NaN, or codes and metadata of all ones (which read as NaN), into every tile that nobody holds."""
    dead = torch.ones(store.pool.capacity, dtype=torch.bool)
    dead[store.table.live_ids()[store.table.live_ids() >= 0]] = False
    for field in store.pool.fields.values():
        field[dead] = torch.nan if field.is_floating_point() else -1


class Feed:
    """Tokens with positions that grow, the same for all rows and heads; slack is NaN."""

    def __init__(self, batch: int, heads: int) -> None:
        self.batch, self.heads, self.next = batch, heads, 0

    def take(self, counts: Tensor, gaps: bool = False) -> Tokens:
        width = int(counts.max())
        steps = torch.randint(1, 4, (width,)) if gaps else torch.ones(width, dtype=torch.long)
        positions = self.next + steps.cumsum(0) - 1
        self.next = int(positions[-1]) + 1
        slack = torch.arange(width) >= counts[..., None]
        shape = (self.batch, self.heads, width)
        return Tokens(
            torch.randn(*shape, DIM).masked_fill(slack[..., None], torch.nan),
            torch.randn(*shape, DIM).masked_fill(slack[..., None], torch.nan),
            positions.expand(self.batch, 1, -1),
            counts,
            {"mass": torch.rand(shape)},
        )


def merge(before: Content, store: TierStore, tokens: Tokens) -> Content:
    """``before`` and the new tokens, as the store has coded them; what is new must be near what was given."""
    after = content(store)
    for b, row in enumerate(before):
        for h, old in enumerate(row):
            new = {p: t for p, t in after[b][h].items() if p not in old}
            count = int(tokens.counts[b, h])
            assert sorted(new) == tokens.positions.expand(-1, store.heads, -1)[b, h, :count].tolist()
            for slot, (key, value, mass) in enumerate(new[p] for p in sorted(new)):
                # 4 bits over a spread of at most 10: a step of 0.67
                assert bool(((key - tokens.keys[b, h, slot]).abs() < 0.35).all())
                assert bool(((value - tokens.values[b, h, slot]).abs() < 0.35).all())
                assert mass == float(tokens.statistics["mass"][b, h, slot])
            old.update(new)
    return before


@pytest.mark.parametrize("kind", ["full", "token", "channel"])
@pytest.mark.parametrize("stores_positions", [False, True])
@pytest.mark.parametrize("trial", range(3))
def test_any_history_keeps_exactly_the_tokens_it_should(kind: str, stores_positions: bool, trial: int) -> None:
    seed = fresh_seed() + trial
    torch.manual_seed(seed)
    dice = random.Random(seed)
    store, feed = store_of(kind, stores_positions=stores_positions), Feed(2, 3)
    held: Content = [[{} for _ in range(3)] for _ in range(2)]
    for _ in range(14):
        action = dice.choice(
            ["append", "append", "ragged", "gaps", "split", "evict", "crop", "rows", "load", "join", "shift"]
        )
        poison(store)
        if action in ("append", "ragged", "gaps"):
            width = dice.choice([TILE, 3 * TILE])
            counts = torch.full((2, 3), width)
            if action == "ragged":
                counts = torch.randint(0, width + 1, (2, 3))
            if bool(counts.any()):
                tokens = feed.take(counts, gaps=action == "gaps")
                store.append(tokens)
                held = merge(held, store, tokens)
        elif action in ("split", "evict") and store.tiles:
            moving = torch.rand(store.table.live_ids().shape) < 0.4
            moving = moving.repeat_interleave(TILE, -1)
            if kind != "channel" and dice.random() < 0.7:
                moving = torch.rand(moving.shape) < 0.4
            taken = store.split(moving, decode=action == "split")
            held = without(held, store, taken, action == "split")
        elif action == "crop" and feed.next:
            end = dice.randint(feed.next * 3 // 4, feed.next)
            store.crop(end)
            held = [[{p: t for p, t in head.items() if p < end} for head in row] for row in held]
        elif action == "rows":
            index = torch.randint(0, 2, (2,))
            store.select_rows(index)
            held = [[dict(head) for head in held[i]] for i in index.tolist()]
        elif action == "join":
            other = store_of(kind, stores_positions=dice.random() < 0.5)
            other.append(feed.take(torch.randint(1, 3 * TILE, (2, 3)), gaps=dice.random() < 0.3))
            other.select_rows(torch.tensor(dice.choice([[0], [1, 1], [0, 1]])))
            more = content(other)
            poison(other)
            store.join(other)
            poison(other)
            assert_same(content(other), more)
            assert_same(content(store), held + more)
            index = torch.randint(0, len(held) + len(more), (2,))
            store.select_rows(index)
            held = [[dict(head) for head in (held + more)[i]] for i in index.tolist()]
        elif action == "shift":
            oldest = min([p for row in held for head in row for p in head], default=0)
            by = dice.randint(-oldest, 9)
            store.shift(by)
            held = [[{p + by: t for p, t in head.items()} for head in row] for row in held]
            feed.next += by
        elif action == "load":
            state = store_state(store)
            store = store_of(kind, stores_positions=store.table.stores_positions)
            load_store(store, state)
        poison(store)
        assert_consistent(store)
        assert_same(content(store), held)


def without(held: Content, store: TierStore, taken: Tokens | None, decoded: bool) -> Content:
    """``held`` less what the store gave up, which must be what it had."""
    after = content(store)
    for b, row in enumerate(held):
        for h, old in enumerate(row):
            gone = sorted(old.keys() - after[b][h].keys())
            if decoded:
                count = 0 if taken is None else int(taken.counts[b, h])
                if not gone:
                    assert not count
                    continue
                assert taken is not None
                assert taken.positions[b, h, :count].tolist() == gone  # in order of position
                for slot, position in enumerate(gone):
                    key, value, mass = old[position]
                    assert torch.equal(taken.keys[b, h, slot], key)
                    assert torch.equal(taken.values[b, h, slot], value)
                    assert float(taken.statistics["mass"][b, h, slot]) == mass
            else:
                assert taken is None
            for position in gone:
                del old[position]
    return held


def test_a_tile_that_is_not_full_is_coded_from_its_own_tokens_alone() -> None:
    torch.manual_seed(fresh_seed())
    counts = torch.tensor([[5, TILE, 1], [TILE, 0, 9]])
    clean = Feed(2, 3).take(counts)
    store, other = store_of("channel"), store_of("channel")
    store.append(clean)
    slack = torch.arange(TILE) >= counts[..., None]
    loud = Tokens(
        clean.keys.masked_fill(slack[..., None], 1e4),
        clean.values.masked_fill(slack[..., None], -1e4),
        clean.positions,
        counts,
        clean.statistics,
    )
    other.append(loud)
    assert_same(content(other), content(store))


class Straight(Kernel):
    """Writes tiles straight into a pool, as kernels do, and counts its calls."""

    name: ClassVar[str] = "straight"
    op: ClassVar[Op] = "encode"

    def __init__(self) -> None:
        self.lengths: list[int] = []

    def supports(self, *args: Any) -> Support:
        return Support(True)

    def __call__(self, quantizer: Quantizer, tokens: Tensor, into: Tiles | None = None) -> None:
        assert into is not None
        self.lengths.append(tokens.shape[2])
        put(quantizer.encode(tokens), into)


@pytest.mark.parametrize("tiles", [1, 11])
def test_a_kernel_that_needs_no_room_is_given_all_tokens_at_once(tiles: int) -> None:
    """Whole tiles of all rows: anything else is gathered first, a piece at a time."""
    torch.manual_seed(fresh_seed())
    kernel, plain = Straight(), store_of("channel")
    store = TierStore(plain.tier, 2, plain.layout, False, codec=Codec(kernel))
    feed = Feed(2, 3)
    all_of_them = feed.take(torch.full((2, 3), tiles * TILE))
    store.append(all_of_them)
    plain.append(all_of_them)
    assert kernel.lengths == [tiles * TILE] * 2
    kernel.lengths.clear()
    for counts in (torch.full((2, 3), 9 * TILE - 1), torch.tensor([[9 * TILE] * 3, [0] * 3])):
        some = feed.take(counts)
        store.append(some)
        plain.append(some)
    assert max(kernel.lengths) == 4 * TILE
    assert_same(content(store), content(plain))


def test_codes_of_tokens_that_stay_are_not_touched_by_a_split() -> None:
    torch.manual_seed(fresh_seed())
    store = store_of("token", 1, 1)
    store.append(Feed(1, 1).take(torch.tensor([[4 * TILE]])))
    before = content(store)
    for _ in range(6):  # re-encoding would drift
        moving = torch.zeros(1, 1, store.tiles * TILE, dtype=torch.bool)
        moving[..., torch.randperm(int(store.lengths[0, 0]))[:3]] = True
        store.split(moving, decode=False)
    after = content(store)
    assert len(after[0][0]) == 4 * TILE - 18
    assert_same(after, [[{p: t for p, t in before[0][0].items() if p in after[0][0]}]])


def test_positions_stay_in_order_when_tokens_of_different_ages_share_a_tile() -> None:
    torch.manual_seed(fresh_seed())
    store = store_of("token", 1, 1, stores_positions=True)
    feed = Feed(1, 1)
    old, new = feed.take(torch.tensor([[TILE]])), feed.take(torch.tensor([[TILE]]))
    store.append(new)  # the newer first, as a second demotion from a finer tier brings them
    store.append(old)
    moving = torch.zeros(1, 1, 2 * TILE, dtype=torch.bool)
    moving[..., ::3] = True
    store.split(moving, decode=False)
    assert_consistent(store)
    left = set(content(store)[0][0])
    store.crop(TILE + 2)
    assert set(content(store)[0][0]) == {p for p in left if p < TILE + 2}


def test_rows_share_tiles_and_eviction_frees_them() -> None:
    torch.manual_seed(fresh_seed())
    store = store_of("token", 1, 2)
    store.append(Feed(1, 2).take(torch.tensor([[8 * TILE, 8 * TILE]])))
    one = live_bytes(store.pool)
    store.select_rows(torch.zeros(5, dtype=torch.long))
    assert live_bytes(store.pool) == one
    assert_same(content(store), [content(store)[0]] * 5)
    moving = torch.zeros(5, 2, 8 * TILE, dtype=torch.bool)
    moving[:4, :, : 6 * TILE] = True
    store.split(moving, decode=False)
    assert live_bytes(store.pool) == one  # row 4 still reads all of it
    store.select_rows(torch.arange(4))
    assert live_bytes(store.pool) == one * 2 // 8
    assert store.lengths.tolist() == [[2 * TILE, 2 * TILE]] * 4


def test_tiles_that_rows_share_are_copied_once_when_they_join() -> None:
    torch.manual_seed(fresh_seed())
    store, other = store_of("token", 1, 2), store_of("token", 1, 2)
    for each in (store, other):
        each.append(Feed(1, 2).take(torch.tensor([[8 * TILE, 8 * TILE]])))
    one = live_bytes(other.pool)
    other.select_rows(torch.zeros(5, dtype=torch.long))
    store.join(other)
    assert live_bytes(store.pool) == 2 * one
    assert_consistent(store)
    store.select_rows(torch.tensor([0]))
    assert live_bytes(store.pool) == one


@pytest.mark.parametrize("fixed", [0, 12])
@pytest.mark.parametrize("kind", ["token", "channel"])
def test_restoring_undoes_everything_since_the_snapshot(kind: str, fixed: int) -> None:
    torch.manual_seed(fresh_seed())
    store, feed = store_of(kind, fixed=fixed), Feed(2, 3)
    store.append(feed.take(torch.full((2, 3), 4 * TILE)))
    before = {name: tensor.clone() for name, tensor in store_state(store).items()}
    restore = store.snapshot()
    store.statistics["mass"].add_(1)
    store.append(feed.take(torch.randint(1, 3 * TILE, (2, 3))))
    restore()
    poison(store)
    after = store_state(store)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert_consistent(store)


def test_a_store_of_fixed_size_never_moves_and_reads_without_its_table_until_tiles_are_shared() -> None:
    torch.manual_seed(fresh_seed())
    store, feed = store_of("token", fixed=9), Feed(2, 3)
    places = {name: field.data_ptr() for name, field in store.pool.fields.items()}
    store.append(feed.take(torch.full((2, 3), 4 * TILE)))
    assert store.runs
    assert store.ahead() == 5
    moving = torch.zeros(2, 3, 4 * TILE, dtype=torch.bool)
    moving[..., TILE : 2 * TILE] = True
    store.split(moving, decode=False)
    assert not store.runs
    store.select_rows(torch.tensor([1, 1]))
    store.reserve(1, 9)
    assert store.ahead() > 0
    ids = [set(store.table.ids.host[b][store.table.ids.host[b] >= 0].tolist()) for b in (0, 1)]
    assert ids[0] & ids[1] == set(
        store.table.live_ids()[0].flatten().tolist()
    )  # what is written is shared, what is reserved is not
    assert places == {name: field.data_ptr() for name, field in store.pool.fields.items()}
    store.clear()
    assert store.runs
    assert store.ahead() == 9


def test_a_saved_store_holds_live_tiles_only() -> None:
    torch.manual_seed(fresh_seed())
    store = store_of("token", 1, 1)
    store.append(Feed(1, 1).take(torch.tensor([[8 * TILE]])))
    moving = torch.zeros(1, 1, 8 * TILE, dtype=torch.bool)
    moving[..., TILE : 2 * TILE] = True
    store.split(moving, decode=False)
    poison(store)
    assert store_state(store)["pool.k.meta"].shape[0] == 7
    copy = store_of("token", 1, 1, stores_positions=store.table.stores_positions)
    load_store(copy, store_state(store))
    assert_same(content(copy), content(store))


def test_nothing_appended_and_nothing_taken_change_nothing() -> None:
    store = store_of("token", 1, 2)
    store.append(Feed(1, 2).take(torch.tensor([[3, 0]])))
    held = content(store)
    empty = Tokens(*torch.empty(2, 1, 2, 0, DIM), torch.empty(1, 1, 0).long(), torch.zeros(1, 2).long(), {})
    store.append(empty)
    taken = store.split(torch.zeros(1, 2, store.tiles * TILE, dtype=torch.bool))
    assert taken is None
    assert_same(content(store), held)
