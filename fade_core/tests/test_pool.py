"""Tiles by id: written once, shared freely, freed when nobody names them."""

from __future__ import annotations

import pytest
import torch
from tiny import fresh_seed
from torch import Tensor

from fade_core.storage.pool import TilePool
from fade_core.support.memory import live_bytes

SHAPES = {"k.codes": ((3, 2), torch.int16), "k.meta": ((2,), torch.int32), "v.raw": ((4,), torch.bfloat16)}


def tiles(count: int) -> dict[str, Tensor]:
    return {
        "k.codes": torch.randint(-(2**15), 2**15, (count, 3, 2), dtype=torch.int16),
        "k.meta": torch.randint(-(2**31), 2**31 - 1, (count, 2), dtype=torch.int32),
        "v.raw": torch.randn(count, 4).bfloat16(),
    }


@pytest.fixture
def pool() -> TilePool:
    torch.manual_seed(fresh_seed())
    return TilePool(SHAPES, torch.device("cpu"))


def test_tiles_are_read_back_in_any_order_and_as_often_as_asked(pool: TilePool) -> None:
    held = tiles(5)
    ids = pool.write(held, torch.empty(0, dtype=torch.long))
    assert len(set(ids.tolist())) == 5
    order = torch.tensor([4, 0, 0, 2, 4, 1])
    found = pool.read(ids[order])
    for name, field in held.items():
        assert torch.equal(found[name], field[order])


def test_a_tile_in_use_is_never_overwritten_and_a_free_one_is_used_again(pool: TilePool) -> None:
    first, second = tiles(4), tiles(3)
    ids = pool.write(first, torch.empty(0, dtype=torch.long))
    alive = torch.tensor([[ids[1], -1], [ids[3], ids[1]]])
    more = pool.write(second, alive)
    assert not set(more.tolist()) & {int(ids[1]), int(ids[3])}
    assert torch.equal(pool.read(ids[[1, 3]])["k.codes"], first["k.codes"][[1, 3]])
    assert torch.equal(pool.read(more)["v.raw"], second["v.raw"])
    assert pool.capacity < 7  # two of the four were free


def test_it_grows_by_little_and_keeps_what_it_holds(pool: TilePool) -> None:
    alive = torch.empty(0, dtype=torch.long)
    held: list[Tensor] = []
    for _ in range(200):
        new = tiles(1)
        held.append(new["k.meta"])
        alive = torch.cat([alive, pool.write(new, alive)])
    assert torch.equal(pool.read(alive)["k.meta"], torch.cat(held))
    assert pool.capacity <= 200 * (1 + 1 / 32) + 1


def test_reserving_ahead_makes_room_for_exactly_what_is_missing(pool: TilePool) -> None:
    pool.take(torch.arange(7), torch.empty(0, dtype=torch.long))
    assert pool.capacity == 7
    before = {name: field.data_ptr() for name, field in pool.fields.items()}
    pool.write(tiles(7), torch.empty(0, dtype=torch.long))
    assert before == {name: field.data_ptr() for name, field in pool.fields.items()}


def test_keeping_some_tiles_frees_the_others(pool: TilePool) -> None:
    held = tiles(12)
    ids = pool.write(held, torch.empty(0, dtype=torch.long))
    before = live_bytes(pool)
    pool.keep(ids[[7, 2, 9]])
    assert pool.capacity == 3
    assert live_bytes(pool) == before // 4
    assert torch.equal(pool.read(torch.arange(3))["k.codes"], held["k.codes"][[7, 2, 9]])
    pool.keep(torch.empty(0, dtype=torch.long))
    assert live_bytes(pool) == 0


def test_free_ids_are_given_as_wished(pool: TilePool) -> None:
    pool.write(tiles(6), torch.empty(0, dtype=torch.long))
    found = pool.take(torch.tensor([5, 3, 9, 1]), torch.tensor([0, 3]))
    assert found[0] == 5
    assert found[3] == 1
    assert set(found.tolist()) == {1, 2, 4, 5}
