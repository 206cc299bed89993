"""``decode_attention`` over tiers against one float64 softmax over everything, with NaN wherever nothing is stored."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from tiny import fresh_seed, give, take_out
from torch import Tensor

from fade_core.builtin.quantizers.full import FullQuantizer
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.interfaces import Quantizer, Tier
from fade_core.ops import reference
from fade_core.ops.reference import (
    AttentionOutput,
    FullSegment,
    PackedSegment,
    Segment,
    TorchAttentionMass,
    TorchDecodeAttention,
    attention_mass,
    decode_attention,
)
from fade_core.storage.slots import TokenLayout
from fade_core.storage.tier_store import TierStore, Tokens
from fade_core.storage.window import Window

TILE, DIM, VALUE_DIM, KV_HEADS, BATCH = 16, 24, 40, 2, 3
CPU = torch.device("cpu")
LAYOUT = TokenLayout(KV_HEADS, torch.float32, CPU)
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(fresh_seed())


def store_of(kind: str, counts: Tensor) -> TierStore:
    """A store with ``counts[b, h]`` tokens, NaN in its spare tiles and in slots that hold none."""
    if kind == "full":
        keys: Quantizer = FullQuantizer(DIM, TILE)
        values: Quantizer = FullQuantizer(VALUE_DIM, TILE)
    else:
        bits, axis = int(kind[0]), kind[1:]
        keys = UniformQuantizer(DIM, bits, axis, tile=TILE)  # type: ignore[arg-type]
        values = UniformQuantizer(VALUE_DIM, bits, "token", 8 if bits == 2 else 0, TILE, "channel")
    store = TierStore(Tier(kind, "rest", keys, values), BATCH, LAYOUT, False)
    width = int(counts.max())
    slack = (torch.arange(width) >= counts[..., None])[..., None]
    store.append(
        Tokens(
            (torch.randn(BATCH, KV_HEADS, width, DIM) + 2).masked_fill(slack, torch.nan),
            torch.randn(BATCH, KV_HEADS, width, VALUE_DIM).masked_fill(slack, torch.nan),
            torch.arange(width).expand(BATCH, 1, -1),
            counts,
            {},
        )
    )
    store.pool.take(torch.arange(5), store.table.live_ids())
    dead = torch.ones(store.pool.capacity, dtype=torch.bool)
    dead[store.table.live_ids()[store.table.live_ids() >= 0]] = False
    for field in store.pool.fields.values():
        field[dead] = torch.nan if field.is_floating_point() else -1
    return store


def window_of(ragged: bool) -> Window:
    """A window of rows of unlike length, NaN behind them."""
    window = Window(BATCH, DIM, VALUE_DIM, 20, LAYOUT)
    give(window, torch.randn(BATCH, KV_HEADS, 9, DIM), torch.randn(BATCH, KV_HEADS, 9, VALUE_DIM), 0)
    if ragged:
        take_out(window, 1, torch.tensor([0, 5, 8]))
        for held in (window.keys, window.values):
            held[:, :, window.longest :] = 1e30  # a window is never given what is not finite
        give(window, torch.randn(BATCH, KV_HEADS, 2, DIM), torch.randn(BATCH, KV_HEADS, 2, VALUE_DIM), 9)
    for held in (window.keys, window.values):
        held[:, :, window.longest :] = torch.nan
    return window


@dataclass
class Case:
    """Segments, and the same tokens as plain tensors."""

    segments: list[Segment]
    keys: Tensor
    values: Tensor
    mask: Tensor  # [B, H_kv, Q, T]


def case(kinds: list[str], queries: int, masked: bool, ragged: bool) -> Case:
    segments: list[Segment] = []
    keys, values, masks = [], [], []
    for kind in kinds:
        counts = torch.randint(0, 5, (BATCH, KV_HEADS)) * TILE + torch.randint(0, TILE, (BATCH, KV_HEADS))
        counts[0, 0] = 5 * TILE
        store = store_of(kind, counts if ragged else torch.full_like(counts, 3 * TILE))
        valid = store.view().valid()
        seen = torch.ones(BATCH, KV_HEADS, queries, store.tiles * TILE, dtype=torch.bool)
        if masked:
            seen = torch.rand(seen.shape) < 0.5
        seen = seen if valid is None else seen & valid[:, :, None]
        segments.append(PackedSegment(store.view(), seen if masked or valid is not None else None))
        k, v = (store.decode(0), store.decode(1))
        keys.append(k.double())
        values.append(v.double())
        masks.append(seen)
    window = window_of(ragged)
    live = (window.live_positions() >= 0)[:, :, None]
    seen = live.expand(-1, -1, queries, -1)
    if masked:
        seen = seen & (torch.rand(seen.shape) < 0.7)
    k, v = window.decode(0), window.decode(1)
    segments.append(FullSegment(k, v, seen if masked or not bool(live.all()) else None))
    keys.append(k.double())
    values.append(v.double())
    masks.append(seen.expand(-1, KV_HEADS, -1, -1))
    return Case(segments, torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, 3))


def dense(
    query: Tensor, found: Case, scaling: float, softcap: float | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, log-sum-exp and probabilities a query head, in float64, without anything that is masked."""
    groups = query.shape[1] // KV_HEADS
    keys, values, mask = (t.repeat_interleave(groups, 1) for t in (found.keys, found.values, found.mask))
    hidden = ~mask.any(2)[..., None]
    logits = query.double() @ keys.masked_fill(hidden, 0).transpose(-1, -2) * scaling
    if softcap:
        logits = softcap * (logits / softcap).tanh()
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        extra = sinks.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, extra], dim=3)
    lse = logits.logsumexp(-1)
    weights = logits.softmax(-1).nan_to_num(0)[..., : keys.shape[2]]
    return weights @ values.masked_fill(hidden, 0), lse, weights


def tolerance(query: Tensor, found: Case, scaling: float) -> tuple[float, float]:
    """What float32 may do to a logit (a sum of 2 D products, codes and minimum apart) and to an output."""
    logit = float((query.double().abs().amax(2).sum(-1) * found.keys.nan_to_num(0).abs().max()).max())
    error = 4 * EPS * abs(scaling) * logit
    return error, (2 * error + 8 * EPS) * float(found.values.nan_to_num(0).abs().max())


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("queries", [1, 4])
@pytest.mark.parametrize("kinds", [[], ["4token"], ["4channel", "2token"], ["full", "8token", "3channel"]])
@pytest.mark.parametrize(("masked", "ragged"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("extras", ["plain", "softcap", "sinks", "both"])
def test_tiers_merged_are_one_softmax(
    groups: int, queries: int, kinds: list[str], masked: bool, ragged: bool, extras: str
) -> None:
    found = case(kinds, queries, masked, ragged)
    if masked:  # a query that sees nothing
        for segment in found.segments:
            assert segment.mask is not None
            segment.mask[1, :, 0] = False
        found.mask[1, :, 0] = False
    query = torch.randn(BATCH, KV_HEADS * groups, queries, DIM) * 3
    softcap = 6.0 if extras in ("softcap", "both") else None
    sinks = torch.randn(KV_HEADS * groups) if extras in ("sinks", "both") else None
    scaling = 0.3
    output = decode_attention(query, found.segments, scaling, softcap, sinks, probabilities=True)
    expected, lse, weights = dense(query, found, scaling, softcap, sinks)
    for_logits, for_output = tolerance(query, found, scaling)
    assert output.output.dtype == torch.float32
    torch.testing.assert_close(output.output.double(), expected, rtol=0, atol=for_output)
    torch.testing.assert_close(
        output.lse.double(), lse, rtol=0, atol=for_logits + 8 * EPS * float(lse[lse.isfinite()].abs().max())
    )
    assert output.probabilities is not None
    averaged = weights.unflatten(1, (KV_HEADS, groups)).mean(2)
    torch.testing.assert_close(
        torch.cat(output.probabilities, 3).double(), averaged, rtol=0, atol=2 * for_logits + 8 * EPS
    )
    for segment, probabilities in zip(found.segments, output.probabilities, strict=True):
        mass = attention_mass(query, segment, output.lse, scaling, softcap)
        torch.testing.assert_close(mass, probabilities, rtol=0, atol=2 * for_logits + 8 * EPS)
    if masked:
        assert not bool(output.output[1, :, 0].any())
        assert torch.equal(
            output.lse[1, :, 0], sinks if sinks is not None else torch.full((query.shape[1],), -torch.inf)
        )


def test_logits_far_apart_neither_overflow_nor_vanish() -> None:
    found = case(["4token"], 2, masked=False, ragged=False)
    query = torch.randn(BATCH, KV_HEADS, 2, DIM) * 1000
    output = decode_attention(query, found.segments, 1.0)
    expected, lse, _ = dense(query, found, 1.0)
    for_logits, for_output = tolerance(query, found, 1.0)
    torch.testing.assert_close(output.lse.double(), lse, rtol=EPS, atol=for_logits)
    torch.testing.assert_close(output.output.double(), expected, rtol=0, atol=for_output)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_queries_are_computed_in_float32(dtype: torch.dtype) -> None:
    found = case(["4channel"], 3, masked=True, ragged=True)
    query = torch.randn(BATCH, KV_HEADS * 2, 3, DIM).to(dtype)
    output = decode_attention(query, found.segments, 0.2)
    assert output.output.dtype == dtype
    assert output.probabilities is None
    expected = decode_attention(query.float(), found.segments, 0.2).output
    assert torch.equal(output.output, expected.to(dtype))


def test_the_order_of_segments_does_not_matter() -> None:
    found = case(["4token", "2token"], 2, masked=True, ragged=True)
    query = torch.randn(BATCH, KV_HEADS, 2, DIM)
    forward = decode_attention(query, found.segments, 0.2)
    backward = decode_attention(query, found.segments[::-1], 0.2)
    torch.testing.assert_close(forward.output, backward.output, rtol=0, atol=1e-5)


def test_the_registered_implementations_are_the_oracle() -> None:
    found = case(["4token"], 1, masked=False, ragged=True)
    query = torch.randn(BATCH, KV_HEADS, 1, DIM)
    direct: AttentionOutput = decode_attention(query, found.segments, 0.2)
    kernel, mass = TorchDecodeAttention(), TorchAttentionMass()
    assert kernel.supports(None, DIM, CPU, torch.float32)
    assert mass.supports(None, DIM, CPU, torch.float32)
    assert torch.equal(kernel(query, found.segments, 0.2).output, direct.output)
    expected = attention_mass(query, found.segments[0], direct.lse, 0.2)
    assert torch.equal(mass(query, found.segments[0], direct.lse, 0.2), expected)


@pytest.mark.parametrize("kind", ["4token", "2channel", "3channel", "full"])
@pytest.mark.parametrize("at_once", [TILE, 2 * TILE + 5])
def test_reading_a_few_tiles_at_once_changes_nothing(kind: str, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    store = store_of(kind, torch.tensor([[70, 70], [16, 16], [33, 33]]))
    segment = PackedSegment(store.view(), valid_mask(store))
    query = torch.randn(BATCH, 3 * KV_HEADS, 2, DIM)
    whole = decode_attention(query, [segment], DIM**-0.5, probabilities=True)
    monkeypatch.setattr(reference, "READ_AT_ONCE", at_once)
    parts = decode_attention(query, [segment], DIM**-0.5, probabilities=True)
    torch.testing.assert_close(parts.output, whole.output, rtol=64 * EPS, atol=64 * EPS)
    torch.testing.assert_close(parts.lse, whole.lse, rtol=64 * EPS, atol=64 * EPS)


def valid_mask(store: TierStore) -> Tensor:
    """bool ``[B, H_kv, 1, T]``: the slots that hold a token."""
    live = store.view().valid()
    assert live is not None
    return live[:, :, None]
