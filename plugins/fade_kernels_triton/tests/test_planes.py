"""Tiers whose channels have widths of their own (``kind = "calibrated"``), read in place."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from oracle import relative_error, scatter, seed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fade_core import FadeConfig, FullSegment, TileView, create_tiered_cache, get_quantizer
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import InputError
from fade_core.interfaces import Event, Quantizer, TelemetrySink, Tier
from fade_core.ops.reference import PackedSegment, decode_attention
from fade_core.packed import Packed
from fade_core.storage.slots import TokenLayout
from fade_core.storage.tier_store import TierStore, Tokens
from fade_kernels_triton.kernel import TritonDecodeAttention
from fade_kernels_triton.planes import PlanesTier, planes_attention, unsupported_planes

calibrated = pytest.importorskip("fade_quant_rotated.calibrated")
calibration = pytest.importorskip("fade_quant_rotated.calibration")
water_fill = pytest.importorskip("fade_quant_rotated.allocation").water_fill

KERNEL = TritonDecodeAttention()
KERNEL_WIDTHS = (0, 2, 4, 6, 8)


def quantizer(
    heads: int, dim: int, side: str, bits: float, tile: int = 64, widths: tuple[int, ...] = KERNEL_WIDTHS,
    group: int = 1, device: str = "cpu", levels: str = "uniform",
) -> Any:  # fmt: skip
    """A calibrated quantizer of random statistics; heads are of different worth, so that they own different widths."""
    forward, _ = torch.linalg.qr(torch.randn(heads, dim, dim))
    deviation = 0.97 ** torch.arange(dim) * (1 + torch.rand(heads, 1))
    worth = deviation.square() * 2.0 ** torch.randn(heads, 1)
    found = calibration.SideCalibration(
        torch.randn(heads, dim), forward.half(), deviation, 1 + torch.rand(heads, 1).expand(-1, dim), worth
    )
    given = water_fill(worth, bits, widths, group)
    return calibrated.CalibratedQuantizer(found, given, side, tile, torch.device(device), levels)


def store_of(keys: Any, values: Any, counts: Tensor, device: str, flat: bool = False) -> TierStore:
    """Random tokens about a mean; ``counts`` int64 ``[B, H_kv]`` of them, the rest of the pool is rubbish."""
    rows, heads = counts.shape
    store = TierStore(
        Tier("t", "rest", keys, values), rows, TokenLayout(heads, torch.float16, torch.device(device)), False
    )
    length = int(counts.max())
    tokens = [torch.randn(rows, heads, length, keys.head_dim, device=device).half() for _ in range(2)]
    if flat:
        tokens = [tokens[0] * 0.01, tokens[1] + 1]
    store.append(Tokens(*tokens, torch.arange(length, device=device).expand(rows, 1, -1), counts, {}))
    scatter(store)
    return store


def packed(store: TierStore) -> PackedSegment:
    """As a cache gives it: the table says which tokens are live."""
    return PackedSegment(store.view(), None, plain=True)


def decoded(segment: PackedSegment, dtype: torch.dtype, queries: int) -> FullSegment:
    """The same tokens in ``dtype``, for torch's own attention."""
    keys, values = segment.store.packed()
    full = (
        q.decode(Packed(p.fields, p.length, torch.float32)).to(dtype)
        for q, p in ((segment.store.tier.keys, keys), (segment.store.tier.values, values))
    )
    return FullSegment(*full, segment.seen(queries))


def check(query: Tensor, segments: list[Any], scaling: float, sinks: Tensor | None = None) -> None:
    """At most twice the error of bf16 attention over the decoded tokens, both against the oracle in float64."""
    assert KERNEL.accepts(query, segments, scaling), KERNEL.accepts(query, segments, scaling).reason
    wanted = decode_attention(query.double(), segments, scaling, sinks=sinks)
    found = KERNEL(query, segments, scaling, sinks=sinks)
    assert found.output.dtype == query.dtype and found.output.shape == query.shape
    count = query.shape[2]
    plain = [decoded(s, torch.bfloat16, count) if isinstance(s, PackedSegment) else s for s in segments]
    plain = [FullSegment(s.keys.bfloat16(), s.values.bfloat16(), s.seen(count)) for s in plain]
    rounded = decode_attention(query.bfloat16(), plain, scaling, sinks=sinks).output.bfloat16()
    assert relative_error(found.output, wanted.output) <= 2 * relative_error(rounded, wanted.output)
    torch.testing.assert_close(found.lse.double(), wanted.lse, atol=6e-3, rtol=2e-3)


CASES = [  # rows, KV heads, query heads, D, tile, bits of keys and values
    (2, 2, 8, 64, 64, 2.25, 1.8),
    (2, 2, 4, 128, 128, 2.0, 2.0),
    (1, 3, 3, 64, 64, 2.7, 1.5),  # rows that words do not divide evenly
    (1, 8, 16, 128, 64, 1.9, 1.6),
    (1, 1, 5, 96, 128, 3.0, 2.2),
    (1, 2, 2, 80, 64, 1.9, 2.0),
    (1, 1, 2, 256, 64, 2.0, 1.7),
]


@pytest.mark.parametrize(("rows", "heads", "query_heads", "dim", "tile", "key_bits", "value_bits"), CASES)
def test_parity(
    rows: int, heads: int, query_heads: int, dim: int, tile: int, key_bits: float, value_bits: float, device: str,
) -> None:  # fmt: skip
    seed()
    keys = quantizer(heads, dim, "key", key_bits, tile, device=device)
    values = quantizer(heads, dim, "value", value_bits, tile, device=device)
    tiles = 3 if device == "cuda" else 2  # interpreted, every tile takes as long again
    store = store_of(keys, values, torch.full((rows, heads), tiles * tile), device)
    query = torch.randn(rows, query_heads, 1, dim, device=device).half()
    check(query, [packed(store)], dim**-0.5)


@pytest.mark.parametrize(
    ("widths", "bits", "group"), [((0, 4), 2.0, 4), ((0, 2), 2.0, 1), ((0, 2, 4), 1.8, 16), ((0, 2, 6, 8), 3.0, 1)]
)
def test_other_even_widths(widths: tuple[int, ...], bits: float, group: int, device: str) -> None:
    seed()
    options: dict[str, Any] = {"widths": widths, "group": group, "device": device}
    keys, values = (quantizer(2, 64, side, bits, **options) for side in ("key", "value"))
    store = store_of(keys, values, torch.full((1, 2), 256 if device == "cuda" else 128), device)
    check(torch.randn(1, 6, 1, 64, device=device).half(), [packed(store)], 0.125)


def test_a_head_without_bits(device: str) -> None:
    seed()
    sides = []
    for side in ("key", "value"):
        made = quantizer(2, 64, side, 2.0, device=device)
        found = calibration.SideCalibration(
            made._state["mean"], torch.eye(64).expand(2, -1, -1).half(), torch.ones(2, 64), torch.ones(2, 64),
            torch.ones(2, 64),
        )  # fmt: skip
        widths = torch.tensor([[4] * 16 + [2] * 16 + [0] * 32, [0] * 64])
        sides.append(calibrated.CalibratedQuantizer(found, widths, side, 64, torch.device(device), "uniform"))
    store = store_of(*sides, torch.full((1, 2), 192), device)
    check(torch.randn(1, 4, 1, 64, device=device).half(), [packed(store)], 0.125)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [1, 3, pytest.param(8, marks=pytest.mark.gpu)])
def test_ragged_rows_beside_a_window_and_another_tier(queries: int, device: str) -> None:
    seed()
    keys, values = (quantizer(2, 64, side, 2.1, device=device) for side in ("key", "value"))
    counts = torch.tensor([[130, 66], [64, 7], [0, 0]])  # tiles cut short, a head without its sibling's, an empty row
    store = store_of(keys, values, counts, device)
    plain = store_of(
        UniformQuantizer(64, 2, "token"), UniformQuantizer(64, 2, "token", layout="channel"), counts, device
    )
    window = [torch.randn(3, 2, 21, 64, device=device).half() for _ in range(2)]
    seen = (torch.arange(21) <= torch.arange(21 - queries, 21)[:, None]).to(device)[None, None]
    query = torch.randn(3, 6, queries, 64, device=device).half()
    segments = [packed(store), packed(plain), FullSegment(*window, seen, plain=True)]
    check(query, segments, 0.2, torch.randn(6, device=device))
    if queries == 1:
        check(query, segments[:1], 0.2, torch.randn(6, device=device))


def test_two_such_tiers_beside_a_rotated_one(device: str) -> None:
    seed()
    sides = [[quantizer(2, 64, side, bits, device=device) for side in ("key", "value")] for bits in (2.1, 1.2)]
    rotated = [get_quantizer("rotated", head_dim=64, bits=4, side=side, device=device) for side in ("key", "value")]
    counts = torch.tensor([[128, 64], [3, 0]])
    stores = [store_of(*pair, counts, device) for pair in (sides[0], rotated, sides[1])]
    query = torch.randn(2, 4, 1, 64, device=device).half()
    segments: list[Any] = [packed(store) for store in stores]
    if KERNEL.accepts(query, segments, 0.2).reason:  # more tiers than one launch has room for
        segments = segments[:2]
    check(query, segments, 0.2)


def test_empty_rows_have_no_mass(device: str) -> None:
    seed()
    keys, values = (quantizer(2, 64, side, 2.1, device=device) for side in ("key", "value"))
    store = store_of(keys, values, torch.tensor([[70, 3], [0, 0]]), device)
    found = KERNEL(torch.randn(2, 4, 1, 64, device=device).half(), [packed(store)], 0.1)
    assert bool((found.lse[1] == -torch.inf).all()) and bool((found.output[1] == 0).all())
    assert bool(found.output[0].isfinite().all())


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "tile", "splits"), [(3, 64, 2), (2, 128, 0)])
def test_tiles_in_place_without_a_table(heads: int, tile: int, splits: int, device: str) -> None:
    """As a cache has them that nobody shares or evicts from: what lies past the tiles in use is rubbish."""
    seed()
    keys, values = (quantizer(heads, 64, side, 2.1, tile, device=device) for side in ("key", "value"))
    tokens = [torch.randn(2, heads, 4 * tile, 64, device=device) for _ in range(2)]
    fields = [q.encode(x).fields for q, x in zip((keys, values), tokens, strict=True)]
    used = torch.tensor([[3], [1]], dtype=torch.int32, device=device).expand(-1, heads).contiguous()
    free = torch.arange(4, device=device) >= used[..., None]
    for side in fields:
        side["codes"][free] = -1
        side["gain"][free] = 255
    pool = {f"{s}.{n}": f.flatten(0, 2) for s, side in zip("kv", fields, strict=True) for n, f in side.items()}
    ids = torch.arange(2 * heads * 4, dtype=torch.int32, device=device).view(2, heads, 4)
    view = TileView(Tier("t", "rest", keys, values), pool, ids, used, None, True, torch.float16, ids.shape[2])
    query = torch.randn(2, 2 * heads, 1, 64, device=device).half()
    check(query, [PackedSegment(view, None, plain=True)], 0.125)
    tier = PlanesTier(keys.planes(), values.planes(), *fields, used)
    one, many = (planes_attention(query, tier, 0.125, splits=n) for n in (1, splits))
    torch.testing.assert_close(one[0], many[0], atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(one[1], many[1], atol=1e-4, rtol=1e-4)


def test_long_and_flat_attention(device: str) -> None:
    seed()
    keys, values = (quantizer(1, 64, side, 2.1, device=device) for side in ("key", "value"))
    store = store_of(keys, values, torch.full((1, 1), 64 * 40), device, flat=True)
    check(torch.randn(1, 2, 1, 64, device=device).half() * 0.1, [packed(store)], 0.125)


# --- in a cache ---
class Events(TelemetrySink):
    def __init__(self) -> None:
        self.reasons: set[str] = set()

    def emit(self, event: Event) -> None:
        if event.kind == "fallback":
            self.reasons.add(event.detail["reason"])


def tiny_llama(device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, initializer_range=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device, torch.bfloat16)


def config_of(decode: str, file: str, **more: Any) -> FadeConfig:
    options = {"widths": KERNEL_WIDTHS, "levels": "uniform"}
    side = {"kind": "calibrated", "file": file, "side_bits": 2.3, **options}
    # Prompts are encoded by torch: through the interpreter that takes longest, and test_planes_encode.py looks at it.
    kernel = {"kind": "torch", "decode_attention": decode, "append": decode}
    fields = {"n_sink": 4, "recent_window": 16, "keys": side, "values": side, "kernel": kernel}
    return FadeConfig.model_validate(fields | more)


@pytest.fixture
def file(tmp_path: Any) -> str:
    """A calibration of random statistics for ``tiny_llama``: no better than a rotation, and of unequal widths."""
    seed()
    sides: dict[str, dict[int, Any]] = {}
    for side in ("key", "value"):
        sides[side] = {}
        for layer in range(1):
            forward, _ = torch.linalg.qr(torch.randn(2, 64, 64))
            worth = 0.96 ** torch.arange(64) * 2.0 ** torch.randn(2, 1)
            sides[side][layer] = calibration.SideCalibration(
                torch.zeros(2, 64), forward.half(), torch.ones(2, 64), torch.ones(2, 64), worth
            )
    made = calibration.Calibration(sides, 64, 2, 1, torch.zeros(1, 16), {"bits": 2.3, "widths": [0, 2, 4], "group": 1})
    path = tmp_path / "calibration.safetensors"
    made.save(path)
    return str(path)


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The random calibration belongs to no model."""
    monkeypatch.setattr(calibrated, "sketch_of", lambda model: None)


@torch.no_grad()
def logits(model: Any, config: FadeConfig, ids: Tensor, prompt: int, **options: Any) -> tuple[Tensor, set[str]]:
    events = Events()
    with create_tiered_cache(model, config, **options) as cache:
        cache.sinks.append(events)
        model(ids[:, :prompt], past_key_values=cache, use_cache=True)
        found = [
            model(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits
            for at in range(prompt, ids.shape[1])
        ]
        cache.settle()
    return torch.cat(found, 1).float(), events.reasons


@pytest.mark.slow
@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize(
    ("prompt", "more"),
    [(90, {}), (152, {"policy": {"kind": "h2o", "budget": 120, "every": 2}})],
    ids=["all", "h2o"],
)
def test_a_growing_cache_decodes_as_torch_does(prompt: int, more: dict[str, Any], file: str, device: str) -> None:
    model = tiny_llama(device)
    ids = torch.randint(1, 97, (1, prompt + 2), device=device)
    wanted, _ = logits(model, config_of("torch", file, **more), ids, prompt)
    found, reasons = logits(model, config_of("triton", file, **more), ids, prompt)
    assert not reasons
    assert relative_error(found, wanted.double()) < 0.02


@pytest.mark.slow
@pytest.mark.usefixtures("anywhere")
def test_a_cache_of_fixed_size_decodes_as_torch_does(file: str, device: str) -> None:
    model = tiny_llama(device)
    ids = torch.randint(1, 97, (1, 85), device=device)  # the third step packs a tile
    wanted, _ = logits(model, config_of("torch", file), ids, 82, max_cache_len=256)
    found, reasons = logits(model, config_of("triton", file), ids, 82, max_cache_len=256)
    assert not reasons
    assert relative_error(found, wanted.double()) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("levels", ["uniform", "gaussian"])
def test_what_is_learnt_from_a_prompt_is_read_where_its_levels_allow(levels: str, device: str) -> None:
    seed()
    model = tiny_llama(device)
    ids = torch.randint(1, 97, (1, 101), device=device)
    side = {"kind": "self-calibrated", "bits": 2.5, "widths": KERNEL_WIDTHS, "levels": levels}
    wanted, _ = logits(model, config_of("torch", "", keys=side, values=side), ids, 100)
    found, reasons = logits(model, config_of("triton", "", keys=side, values=side), ids, 100)
    assert relative_error(found, wanted.double()) < 0.02
    if levels == "uniform":
        assert not reasons
    else:
        assert any("levels = 'uniform'" in reason for reason in reasons)


# --- what it refuses ---
def test_it_refuses_and_says_why(device: str) -> None:
    seed()
    query = torch.randn(1, 2, 1, 64, device=device).half()

    def reason(keys: Any, values: Any, **options: Any) -> str:
        segment = packed(store_of(keys, values, torch.full((1, 2), 64), device))
        answer = KERNEL.accepts(query, [segment], 0.1, **options)
        if not answer:
            with pytest.raises(InputError, match=re.escape(answer.reason)):
                KERNEL(query, [segment], 0.1, **options)
        return str(answer.reason)

    good = [quantizer(2, 64, side, 2.1, device=device) for side in ("key", "value")]
    assert not reason(*good)
    assert "mean" in reason(*good, softcap=5.0)
    for other in (
        quantizer(2, 64, "key", 2.1, widths=(0, 2, 3), device=device),
        quantizer(2, 64, "key", 2.1, levels="gaussian", device=device),
    ):
        assert "'calibrated' has no packed format and no planes" in reason(other, good[1])
    assert "channel-major" in reason(quantizer(2, 64, "value", 2.1, device=device), good[1])
    tall = [quantizer(2, 64, side, 2.1, 32, device=device) for side in ("key", "value")]
    assert "tiles of 32" in reason(*tall)
    many = quantizer(1, 256, "key", 7.9, widths=(0, 2, 4, 8), device=device).planes()
    assert "planes a head (it reads up to 32)" in unsupported_planes(many, "key")
    uniform = UniformQuantizer(64, 4, "token", layout="channel")
    assert "no packed format" in reason(good[0], uniform)


def test_a_cache_without_a_format_is_asked_call_by_call(device: str) -> None:
    where = torch.device(device)
    assert KERNEL.supports(None, 64, where, torch.float16)
    assert "head_dim 72" in KERNEL.supports(None, 72, where, torch.float16).reason
    assert Quantizer.planes(UniformQuantizer(64, 4)) is None
