"""The mass kernel gives what attention over the decoded keys gives, and a ranking cache the same statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from oracle import scatter, seed
from test_append import Turned
from test_kernel_cache import model
from torch import Tensor

from fade_core import AttentionTracker, FadeConfig, FullSegment, PackedSegment, Tier, create_tiered_cache
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import InputError
from fade_core.ops.reference import attention_mass, decode_attention
from fade_core.packed import Packed
from fade_core.storage.slots import TokenLayout
from fade_core.storage.tier_store import TierStore, Tokens
from fade_core.testing import check_kernel
from fade_kernels_triton.mass import TritonAttentionMass

CASES = [
    (4, "channel", 64, 128, 4, 1, torch.bfloat16),
    (4, "token", 128, 64, 7, 3, torch.float16),
    (2, "channel", 64, 80, 1, 8, torch.bfloat16),
    (2, "token", 64, 256, 2, 2, torch.bfloat16),
    (3, "channel", 64, 128, 4, 1, torch.bfloat16),
]


def store(tier: Tier, device: str, tiles: int = 3, table: bool = False) -> TierStore:
    """Two rows of two heads, the second row and its last tile cut short; what nobody holds is NaN.

    Tiles lie in runs, or with a ``table`` anywhere.
    """
    dim, tile = tier.keys.head_dim, tier.keys.tile
    held = TierStore(tier, 2, TokenLayout(2, torch.bfloat16, torch.device(device)), False, fixed=tiles)
    length = tiles * tile
    keys = torch.randn(2, 2, length, dim, device=device) + 2 * torch.randn(1, 2, 1, dim, device=device)
    counts = torch.tensor([[length] * 2, [length - tile - 9] * 2])
    positions = torch.arange(length, device=device).expand(2, 1, -1)
    held.append(Tokens(keys.bfloat16(), torch.zeros_like(keys).bfloat16(), positions, counts, {}))
    used = held.table.live_ids()[held.table.live_ids() >= 0]
    for name, field in held.pool.fields.items():
        free = torch.ones(len(field), dtype=torch.bool)
        free[used] = False
        if name.endswith("meta"):
            field[free.to(device)] = -1  # two halves of NaN
    if table:
        scatter(held)
    return held


def tier(bits: int, axis: str, tile: int, dim: int) -> Tier:
    keys = UniformQuantizer(dim, bits, axis, tile=tile)  # type: ignore[arg-type]
    return Tier("int", "rest", keys, UniformQuantizer(dim, bits, tile=tile, layout="channel"))


def exact(query: Tensor, segment: PackedSegment, lse: Tensor, **options: Any) -> Tensor:
    """The oracle in float64."""
    tier, (keys, values) = segment.store.tier, segment.store.packed()
    keys, values = tier.keys.decode(keys), tier.values.decode(values)
    full = FullSegment(keys.double(), values.double(), segment.seen(query.shape[2]))
    return attention_mass(query.double(), full, lse.double(), query.shape[-1] ** -0.5, **options)


@pytest.mark.parametrize(("softcap", "table"), [(None, False), (20.0, True)])
@pytest.mark.parametrize(("bits", "axis", "tile", "dim", "group", "queries", "dtype"), CASES)
def test_the_kernel_is_the_oracle(
    bits: int, axis: str, tile: int, dim: int, group: int, queries: int, dtype: torch.dtype, softcap: float | None,
    table: bool, device: str,
) -> None:  # fmt: skip
    """As close to float64 as probabilities of fp16 logits can be: a relative error of twice the logits' absolute one."""
    seed()
    held = store(tier(bits, axis, tile, dim), device, table=table)
    live = held.view().valid()
    assert live is not None and held.runs != table
    segment = PackedSegment(held.view(), None, plain=True)  # as a cache gives it: the table says which tokens are live
    query = torch.randn(2, 2 * group, queries, dim, device=device).to(dtype)
    scaling = dim**-0.5
    lse = decode_attention(query, [segment], scaling, softcap).lse
    kernel = TritonAttentionMass()
    assert kernel.accepts(query, segment, lse, scaling, softcap)
    found, wanted = kernel(query, segment, lse, scaling, softcap), exact(query, segment, lse, softcap=softcap)
    assert found.shape == wanted.shape
    assert bool(found.isfinite().all())
    assert not bool(found[~live[:, :, None].expand_as(found)].any())
    keys, _ = (held.decode(0), held.decode(1))
    norms = query.float().norm(dim=-1).max() * keys.float().norm(dim=-1).max() * scaling
    bound = 2 * float(norms) * 2**-10 + 1e-3  # fp16 rounds query and scaled query by 2^-11 each
    assert float((found.double() - wanted).abs().max() / wanted.max()) < bound
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found.sum(-1)), rtol=0, atol=bound)


def test_a_query_that_sees_nothing_gives_nothing(device: str) -> None:
    seed()
    segment = PackedSegment(store(tier(4, "token", 64, 64), device).view(), None, plain=True)
    query = torch.randn(2, 4, 2, 64, device=device).half()
    lse = torch.full((2, 4, 2), -math.inf, device=device)
    assert not bool(TritonAttentionMass()(query, segment, lse, 0.1).any())


def statistics(part: FullSegment | PackedSegment, tokens: int, tracker: AttentionTracker) -> dict[str, Tensor]:
    shape = (2, 2, tokens)
    return {name: torch.rand(shape, device=part_device(part)) for name in tracker.statistics}


def part_device(part: FullSegment | PackedSegment) -> torch.device:
    return part.keys.device if isinstance(part, FullSegment) else part.store.used.device


def window(queries: int, dim: int, dtype: torch.dtype, device: str, tokens: int = 75) -> FullSegment:
    """Two rows of other lengths, NaN behind them."""
    keys = torch.randn(2, 2, tokens, dim, device=device).to(dtype)
    lengths = torch.randint(queries, tokens + 1, (2, 1), device=device).int().expand(2, 2).contiguous()
    keys[(torch.arange(tokens, device=device) >= lengths[..., None])] = torch.nan
    return FullSegment(keys, torch.zeros_like(keys), None, True, lengths)


@pytest.mark.parametrize(("queries", "softcap", "dtype"), [(1, None, torch.bfloat16), (3, 5.0, torch.float16)])
def test_masses_of_a_window_whose_lengths_are_on_the_device(
    queries: int, softcap: float | None, dtype: torch.dtype, device: str
) -> None:
    seed()
    part, query = window(queries, 80, dtype, device), torch.randn(2, 6, queries, 80, device=device).to(dtype)
    clean = FullSegment(part.keys.nan_to_num().double(), part.values.double(), part.seen(queries))
    exactly = decode_attention(query.double(), [clean], 0.1, softcap)
    wanted = attention_mass(query.double(), clean, exactly.lse, 0.1, softcap)
    found = TritonAttentionMass()(query, part, exactly.lse.float(), 0.1, softcap)
    assert found is not None and bool(found.isfinite().all())
    torch.testing.assert_close(
        found.double(), wanted, rtol=1e-4, atol=1e-6
    )  # products of 16 bits are summed in float32


EVERY = ("mass", "seen", "ema", "last", "window")


@pytest.mark.parametrize("names", [("mass", "seen"), EVERY])
@pytest.mark.parametrize("queries", [1, 3])
def test_statistics_follow_as_the_tracker_says(queries: int, names: tuple[str, ...], device: str) -> None:
    """Of tiles, some of them cut short or not in use, and of a window."""
    seed()
    tracker, kernel = AttentionTracker(names, decay=0.7, observation_window=5), TritonAttentionMass()
    held, recent = store(tier(3, "channel", 64, 64), device, table=True), window(queries, 64, torch.bfloat16, device)
    parts = [PackedSegment(held.view(), None, plain=True), recent]
    query = torch.randn(2, 4, queries, 64, device=device).bfloat16()
    clean = FullSegment(recent.keys.nan_to_num(), recent.values, recent.seen(queries))
    lse = decode_attention(query, [parts[0], clean], 0.125).lse
    for part in parts:
        tokens = recent.keys.shape[2] if part is recent else held.view().tiles * 64
        ours = statistics(part, tokens, tracker)
        theirs = {name: noted.clone() for name, noted in ours.items()}
        observation = tracker.observation(ours, queries)
        assert kernel.accepts(query, part, lse, 0.125, None, noted=observation)
        assert kernel(query, part, lse, 0.125, None, noted=observation) is None
        given = kernel(query, part, lse, 0.125)
        assert given is not None
        tracker.age(theirs, queries)
        tracker.observe(theirs, given, part.seen(queries))
        in_use = torch.ones(2, 2, tokens, dtype=torch.bool, device=device)
        if part is not recent:  # tiles without tokens have nothing to be kept
            number = torch.arange(tokens, device=device) // 64
            in_use = number < held.view().used[..., None]
        for name in names:
            torch.testing.assert_close(ours[name][in_use], theirs[name][in_use], rtol=1e-6, atol=1e-6)


def test_statistics_that_it_cannot_keep_are_refused(device: str) -> None:
    part, query = window(2, 64, torch.float16, device), torch.randn(2, 4, 2, 64, device=device).half()
    kernel, lse = TritonAttentionMass(), torch.zeros(2, 4, 2, device=device)
    few = AttentionTracker(("window",), observation_window=1)
    refused = kernel.accepts(query, part, lse, 1.0, None, noted=few.observation(statistics(part, 75, few), 2))
    assert "1 observed of 2" in refused.reason
    whole = AttentionTracker(("mass",))
    apart = {"mass": torch.zeros(2, 75, 2, device=device).transpose(1, 2)}
    assert "strides" in kernel.accepts(query, part, lse, 1.0, None, noted=whole.observation(apart, 2)).reason
    told = FullSegment(part.keys, part.values, None, True, torch.tensor([70, 75]))
    noted = whole.observation(statistics(part, 75, whole), 2)
    with pytest.raises(InputError, match="the host tells"):
        kernel(query, told, lse, 1.0, None, noted=noted)


class TurnedKeys(Turned):
    """Codes of turned keys, read by turned queries."""

    def transform_query(self, query: Tensor) -> Tensor:
        return query @ self.turn.to(query.dtype)

    def decode(self, packed: Packed) -> Tensor:
        return (super().decode(packed).float() @ self.turn.T).to(packed.dtype)


def test_turned_keys(device: str) -> None:
    seed()
    keys = TurnedKeys(64, 4)
    keys.turn = keys.turn.to(device)
    held = store(Tier("turned", "rest", keys, UniformQuantizer(64, 4, layout="channel")), device, 2)
    live = held.view().valid()
    assert live is not None
    segment = PackedSegment(held.view(), live[:, :, None], plain=True)
    query = torch.randn(2, 4, 1, 64, device=device).bfloat16()
    decoded = [side.float() for side in (held.decode(0), held.decode(1))]
    lse = decode_attention(query.float(), [FullSegment(decoded[0], decoded[1], segment.mask)], 0.125).lse
    found, wanted = TritonAttentionMass()(query, segment, lse, 0.125), exact(query, segment, lse)
    assert float((found.double() - wanted).abs().max() / wanted.max()) < 0.03


@pytest.mark.slow
def test_conformance(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    results = check_kernel(TritonAttentionMass(), device=device, dtype=dtype)
    assert all(r.passed for r in results if r.name not in DTYPE_CHECKS), results


DTYPE_CHECKS = ("agreement", "several_queries", "head_shapes", "softcap_and_sinks", "long_and_flat")
"""They allow twice the oracle's own error, which in float32 is none: here tensor cores take fp16."""


@pytest.mark.slow
def test_a_ranking_cache_sees_the_same_masses(device: str) -> None:
    number = seed()
    llama = model(device)
    ids, steps = (torch.randint(1, 64, (2, n), generator=torch.Generator().manual_seed(number)) for n in (140, 4))
    held = []
    for kind in ("torch", "triton"):
        config = FadeConfig(
            n_sink=4,
            recent_window=16,
            policy={"kind": "h2o", "budget": 0.9, "every": 64},
            kernel={"decode_attention": "triton", "attention_mass": kind},
        )
        events: list[Any] = []
        with torch.no_grad(), create_tiered_cache(llama, config) as cache:
            for layer in cache.tiered:
                layer.plan.emit = events.append
            llama(ids.to(device), past_key_values=cache, use_cache=True)
            for step in steps.split(1, 1):
                llama(step.to(device), past_key_values=cache, use_cache=True)
            held.append([layer.held.stores[0].statistics["mass"].clone() for layer in cache.tiered])
        assert not [event for event in events if event.kind == "fallback"]
    for ours, theirs in zip(*held, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=2e-3)


def test_what_it_does_not_take_is_refused_with_the_reason(device: str) -> None:
    kernel, held = TritonAttentionMass(), store(tier(4, "token", 64, 64), device)
    query, lse = torch.randn(2, 4, 9, 64, device=device).half(), torch.zeros(2, 4, 9, device=device)
    assert "9 query tokens" in kernel.accepts(query, PackedSegment(held.view(), None, plain=True), lse, 1.0).reason
    hidden = PackedSegment(held.view(), torch.zeros(2, 1, 1, 192, dtype=torch.bool, device=device), plain=False)
    with pytest.raises(InputError, match="hides stored tokens"):
        kernel(query[:, :, :1], hidden, lse[:, :, :1], 1.0)
    assert "head_dim 48" in kernel.supports(held.tier.keys.format, 48, torch.device(device), torch.float16).reason
    window = FullSegment(torch.randn(2, 2, 5, 64, device=device), torch.randn(2, 2, 5, 64, device=device))
    assert kernel.accepts(query, window, lse, 1.0)
