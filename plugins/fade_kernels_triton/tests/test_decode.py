from __future__ import annotations

import pytest
import torch
from oracle import attend64, relative_error, seed, tier_case, window_case

from fade_kernels_triton.decode import Splits, decode_attention
from fade_kernels_triton.merge import MERGED, merge_options

TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 6e-3}  # rounding of P and of the output, in units of the dtype


def run(query, tiers, window, *, config=None, splits=None, **options):
    wanted, wanted_lse = attend64(query, tiers, window, **options)
    found, lse = decode_attention(
        query, [t.tier for t in tiers], window.window if window else None, config=config, splits=splits, **options
    )
    assert found.dtype == query.dtype and found.shape == query.shape
    assert relative_error(found, wanted) < TOLERANCE[query.dtype]
    torch.testing.assert_close(lse.double(), wanted_lse, atol=6e-3, rtol=2e-3)


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize(
    ("bits", "tile"), [(4, 64), (4, 128), (2, 64), (2, 128), ((3, 2), 64), ((3, 2), 128), ((4, 2), 64)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_packed_tier(bits, tile, axis, dtype, device):
    seed()
    rows = 2 if device == "cuda" else 1  # interpreted, every row takes as long again
    tier = tier_case(rows, 2, 3, 128, bits, axis, tile, device=device, group=0 if isinstance(bits, int) else 32)
    query = torch.randn(rows, 8, 1, 128, device=device).to(dtype)
    run(query, [tier], None, splits=Splits(2, 0, 0))


FEW, MANY = Splits(3, 0, 2), Splits(9, 0, 1)


@pytest.mark.parametrize(
    ("bits", "axis", "splits", "group"),
    [
        (2, "token", FEW, 0),
        (2, "channel", MANY, 32),
        (4, "token", MANY, 0),
        (4, "channel", FEW, 16),
        ((3, 2), "channel", MANY, 0),
        ((3, 2), "token", FEW, 32),
        ((4, 2), "channel", FEW, 16),
    ],
)
def test_ragged_pool_with_a_window(bits, axis, splits, group, device):
    seed()
    tier = tier_case(3, 2, 5, 64, bits, axis, table=True, ragged=True, device=device, group=group)
    window = window_case(3, 2, 70, 64, torch.float16, ragged=True, device=device)
    query = torch.randn(3, 14, 1, 64, device=device).half()
    run(query, [tier], window, splits=splits)


@pytest.mark.parametrize("q_len", [1, 2, 5])
def test_two_tiers_and_a_window(q_len, device):
    seed()
    first = tier_case(2, 2, 3, 128, 4, "channel", ragged=True, table=True, device=device)
    second = tier_case(2, 2, 4, 128, (3, 2), "token", ragged=True, table=True, device=device, group=32)
    window = window_case(2, 2, 40, 128, torch.bfloat16, ragged=True, at_least=q_len, device=device)
    query = torch.randn(2, 6, q_len, 128, device=device).bfloat16()
    run(query, [first, second], window, splits=Splits(2, 1, 1))


@pytest.mark.parametrize(("dim", "bits", "group"), [(80, 4, 0), (96, (3, 2), 0), (256, (3, 2), 64)])
def test_head_dims(dim, bits, group, device):
    seed()
    tier = tier_case(1, 2, 2, dim, bits, "channel", device=device, group=group)
    window = window_case(1, 2, 33, dim, torch.float16, device=device)
    query = torch.randn(1, 8, 1, dim, device=device).half()
    run(query, [tier], window, splits=Splits(1, 0, 1))


@pytest.mark.parametrize("group", [1, 5, 16])
def test_group_sizes(group, device):
    seed()
    tier = tier_case(1, 2, 2, 64, 4, "token", device=device)
    query = torch.randn(1, 2 * group, 2, 64, device=device).half()
    run(query, [tier], window_case(1, 2, 9, 64, torch.float16, device=device), splits=Splits(1, 0, 1))


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [2, 4, (3, 2)])
def test_softcap_sinks_and_sliding_window(bits, axis, device):
    seed()
    tier = tier_case(2, 1, 3, 64, bits, axis, table=True, ragged=True, positions=True, device=device)
    window = window_case(2, 1, 20, 64, torch.float16, positions=True, start=192, device=device)
    query = 3 * torch.randn(2, 4, 3, 64, device=device)
    now = torch.tensor([[209, 210, 211]] * 2, dtype=torch.int32, device=device)
    sinks = torch.randn(4, device=device)
    run(
        query.half(), [tier], window, splits=Splits(2, 0, 1), softcap=8.0, sliding_window=60, s_aux=sinks,
        query_positions=now, scaling=0.2,
    )  # fmt: skip


@pytest.mark.parametrize("axis", ["token", "channel"])
@pytest.mark.parametrize("bits", [2, 4, (3, 2), (4, 2)])
def test_partly_filled_tiles(bits, axis, device):
    seed()
    tier = tier_case(2, 2, 3, 64, bits, axis, partial=True, ragged=True, device=device)
    query = torch.randn(2, 4, 1, 64, device=device).half()
    window = window_case(2, 2, 5, 64, torch.float16, device=device)
    run(query, [tier], window, splits=Splits(2, 0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("sinks", [False, True])
def test_more_parts_than_are_merged_at_once(sinks, device):
    """Most of them empty, some with scores far above those that came before: online, every chunk outdoes the last."""
    seed()
    rows = 2 if device == "cuda" else 1
    tier = tier_case(rows, 1, 5, 256, 4, "token", ragged=True, table=True, device=device)
    window = window_case(rows, 1, 40, 256, torch.float16, device=device)
    query = 3 * torch.randn(rows, 2, 1, 256, device=device).half()
    splits = Splits(261, 0, 4)
    assert splits.total > merge_options(splits.total, 256)["CHUNK"]
    options = {"s_aux": torch.randn(2, device=device)} if sinks else {}
    run(query, [tier], window, splits=splits, **options)


def test_merging_takes_what_registers_hold():
    for dim in (64, 128, 256):
        for splits in (1, 16, 17, 64, 256, 500):
            options = merge_options(splits, dim)
            assert options["CHUNK"] >= min(splits, 256)
            assert options["CHUNK"] * options["CHANNELS"] <= MERGED
            assert dim % options["CHANNELS"] == 0
    assert merge_options(9, 128) == {"CHUNK": 16, "CHANNELS": 128, "num_warps": 4}
    assert merge_options(132, 128) == {"CHUNK": 256, "CHANNELS": 16, "num_warps": 4}
