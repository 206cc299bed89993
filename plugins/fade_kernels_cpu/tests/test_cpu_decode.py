from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fade_core import FadeConfig, create_tiered_cache
from fade_core.builtin.quantizers.uniform import UniformConfig
from fade_core.errors import InputError
from fade_core.interfaces import Event, Quantizer, TelemetrySink, Tier
from fade_core.ops.reference import FullSegment, PackedSegment, Segment, decode_attention
from fade_core.packed import Packed, PackedFormat, pack_codes, pack_meta, planes_of, unpack_codes, unpack_meta
from fade_core.storage.tile_view import TileView
from fade_core.testing import check_kernel
from fade_core.testing.kernel import _double
from fade_kernels_cpu.kernel import CpuDecodeAttention

KERNEL = CpuDecodeAttention()
FORMATS = {
    "safe": (UniformConfig(bits=4, axis="channel"), UniformConfig(bits=4)),
    "balanced": (UniformConfig(bits=3, axis="channel"), UniformConfig(bits=2, group=32)),
    "groups": (UniformConfig(bits=2, group=16), UniformConfig(bits=8, group=8)),
    "channels": (UniformConfig(bits=3, axis="channel", group=16), UniformConfig(bits=3, axis="channel", group=32)),
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    value = int(os.environ.get("FADE_SEED", time.time_ns() % 2**31))
    print(f"FADE_SEED={value}")
    torch.manual_seed(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_conformance(name: str, dtype: torch.dtype) -> None:
    keys, values = FORMATS[name]
    results = check_kernel(KERNEL, device="cpu", dtype=dtype, keys=keys, values=values)
    assert {r.name for r in results if r.outcome == "passed"} >= {"agreement", "several_queries", "long_and_flat"}
    assert not [r for r in results if r.outcome not in ("passed", "not applicable")]


class Coded(Quantizer):
    """Any codes and scales of a format, whatever its layout and levels; read by decoding alone."""

    kind = "coded"

    def __init__(self, fmt: PackedFormat) -> None:
        self.format, self.head_dim, self.tile = fmt, fmt.head_dim, fmt.tile

    @property
    def bits_per_element(self) -> float:
        return 0.0

    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self.format.field_shapes()

    def pool(self, tiles: int) -> dict[str, Tensor]:
        """Random tiles."""
        fmt, fields = self.format, dict[str, Tensor]()
        for name, (shape, dtype) in fmt.field_shapes().items():
            if name == "meta":
                fields[name] = pack_meta(torch.rand(tiles, *shape) / 2**fmt.bits, torch.randn(tiles, *shape) / 4)
            else:
                width = int(name[5:])
                codes = torch.randint(2**width, (tiles, fmt.tile, fmt.head_dim))
                fields[name] = pack_codes(codes, width, fmt.layout)
            assert fields[name].shape[1:] == shape
            assert fields[name].dtype == dtype
        return fields

    def encode(self, x: Tensor) -> Packed:
        raise NotImplementedError

    def decode(self, packed: Packed) -> Tensor:
        fmt = self.format
        codes = torch.zeros((), dtype=torch.int64)
        for width in planes_of(fmt.bits):
            codes = (codes << width) | unpack_codes(packed.fields[f"codes{width}"], width, fmt.layout, torch.int64)
        codes = codes.transpose(-1, -2) if fmt.layout == "channel" else codes  # [B, H, n, tile, D]
        levels = codes.double() if fmt.levels is None else torch.tensor(fmt.levels, dtype=torch.float64)[codes]
        scale, least = (m.double() for m in unpack_meta(packed.fields["meta"]))
        if fmt.axis == "token":  # [B, H, n, groups, tile]
            scale, least = (m.transpose(-1, -2).repeat_interleave(fmt.group, -1) for m in (scale, least))
        else:  # [B, H, n, groups, D]
            scale, least = (m.repeat_interleave(fmt.group, -2) for m in (scale, least))
        return (levels * scale + least).flatten(2, 3)[:, :, : packed.length].to(packed.dtype)


class Turned(Coded):
    """Keys that are coded turned and about a mean; values likewise."""

    def __init__(self, fmt: PackedFormat) -> None:
        super().__init__(fmt)
        self.turn = torch.linalg.qr(torch.randn(fmt.head_dim, fmt.head_dim, dtype=torch.float64)).Q
        self.mean = torch.randn(fmt.head_dim, dtype=torch.float64)

    def decode(self, packed: Packed) -> Tensor:
        return (super().decode(replace(packed, dtype=torch.float64)) @ self.turn.T + self.mean).to(packed.dtype)

    def transform_query(self, query: Tensor) -> Tensor:
        return query @ self.turn.to(query.dtype)

    def query_bias(self, query: Tensor) -> Tensor:
        return query @ self.mean[:, None].to(query.dtype)

    def transform_output(self, output: Tensor, weight_sum: Tensor) -> Tensor:
        return output @ self.turn.T.to(output.dtype) + weight_sum * self.mean.to(output.dtype)


def random_format(dim: int, tile: int) -> PackedFormat:
    """Any format that can be packed."""
    bits = [1, 2, 3, 4, 5, 6, 8][int(torch.randint(7, ()))]
    axis = ["token", "channel"][int(torch.randint(2, ()))]
    group = [g for g in (0, 8, 16) if not g or (dim if axis == "token" else tile) % g == 0][int(torch.randint(2, ()))]
    layout = ["token", "channel"][int(torch.randint(2, ()))]
    levels = tuple(torch.randn(2**bits).sort().values.tolist()) if torch.rand(()) < 0.3 else None
    return PackedFormat(bits, dim, tile, axis, group, layout, levels)  # type: ignore[arg-type]


def random_tier(rows: int, heads: int, dim: int, tile: int) -> PackedSegment:
    """A tier of ragged heads, its tiles anywhere in a pool whose other tiles are NaN, some cut short."""
    made = [Turned if torch.rand(()) < 0.3 else Coded for _ in range(2)]
    keys, values = (kind(random_format(dim, tile)) for kind in made)
    most = int(torch.randint(1, 5, ()))
    used = torch.randint(0, most + 1, (rows, heads), dtype=torch.int32)
    ids = torch.randperm(rows * heads * most + 5)[: rows * heads * most].int().view(rows, heads, most)
    live = torch.arange(most) < used[..., None]
    fields = {}
    for side, quantizer in (("k", keys), ("v", values)):
        for name, field in quantizer.pool(rows * heads * most + 5).items():
            unused = torch.ones(len(field), dtype=torch.bool)
            unused[ids[live].long()] = False
            field[unused] = -1  # fp16 scales of NaN
            fields[f"{side}.{name}"] = field
    counts = torch.randint(1, tile + 1, (rows, heads, most), dtype=torch.int32) if torch.rand(()) < 0.5 else None
    ids = ids.where(live, ids.new_full((), 10**9))  # what is not in use may be anything
    view = TileView(Tier("t", "rest", keys, values), fields, ids, used, counts, False, torch.float32, most)
    return PackedSegment(view, None, plain=True)


def random_window(rows: int, heads: int, dim: int, queries: int, dtype: torch.dtype) -> FullSegment:
    tokens = int(torch.randint(queries, 700, ()))
    held = torch.full((2, rows, heads, tokens + 9, dim + 8), torch.nan, dtype=dtype)  # rows and tokens are strided
    held[:, :, :, :tokens, :dim] = torch.randn(2, rows, heads, tokens, dim).to(dtype)
    keys, values = held[0, :, :, :tokens, :dim], held[1, :, :, :tokens, :dim]
    if torch.rand(()) < 0.5:
        return FullSegment(keys, values, None, plain=True)
    lengths = torch.randint(queries, tokens + 1, (rows,), dtype=torch.int32)[:, None].expand(-1, heads)
    return FullSegment(keys, values, None, True, lengths)


def precise(segment: Segment, queries: int) -> FullSegment:
    """The same tokens in float64; a mask says which are there."""
    seen = segment.seen(queries)
    full = _double(segment)
    assert isinstance(full, FullSegment)
    tokens = [t.nan_to_num(0.0) for t in (full.keys, full.values)]  # where a mask hides them
    return FullSegment(*tokens, mask=seen)


@pytest.mark.parametrize("case", range(24))
def test_any_format_table_and_window_is_read_as_the_reference_reads_it(case: int) -> None:
    rows, heads, group, queries = (int(torch.randint(1, n, ())) for n in (4, 4, 6, 5))
    dim, tile = [8, 24, 64, 80, 128][case % 5], [64, 128, 32][case % 3]
    dtype = [torch.float32, torch.bfloat16, torch.float16][case % 3]
    segments: list[Segment] = [random_tier(rows, heads, dim, tile) for _ in range(case % 3)]
    segments.append(random_window(rows, heads, dim, queries, dtype))
    if case % 4 == 1 and case % 3:
        view = segments[0]
        assert isinstance(view, PackedSegment)
        valid = view.store.valid()
        slots = view.store.tiles * tile
        seen = (torch.rand(rows, 1, queries, slots) < 0.7).expand(-1, heads, -1, -1)
        segments[0] = replace(view, mask=seen if valid is None else seen & valid[:, :, None], plain=False)
    query = torch.randn(rows, heads * group, queries, dim).to(dtype)
    softcap, sinks = (30.0 if case % 5 == 2 else None), (torch.randn(heads * group) if case % 4 == 2 else None)
    assert KERNEL.accepts(query, segments, dim**-0.5, softcap, sinks, probabilities=True)
    found = KERNEL(query, segments, dim**-0.5, softcap, sinks, probabilities=True)
    exact = decode_attention(
        query.double(), [precise(s, queries) for s in segments], dim**-0.5, softcap, sinks, probabilities=True
    )
    # float32 sums of some thousand products of numbers of one magnitude; then one rounding to the dtype
    size = float(exact.output.abs().max())
    allowed = (2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps) * max(size, 1.0)
    assert (found.output.double() - exact.output).abs().max() <= allowed
    there = exact.lse > -torch.inf
    assert torch.equal(there, found.lse > -torch.inf)
    assert (found.lse.double() - exact.lse)[there].abs().max() <= 1e-4
    assert found.probabilities is not None
    assert exact.probabilities is not None
    for mine, wanted in zip(found.probabilities, exact.probabilities, strict=True):
        assert (mine.double() - wanted).abs().max() <= 2e-5


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    segments: list[Segment] = [random_tier(2, 3, 64, 64), random_window(2, 3, 64, 1, torch.float32)]
    query = torch.randn(2, 9, 1, 64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(KERNEL(query, segments, 0.125))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(found[0].output, other.output)
        assert torch.equal(found[0].lse, other.lse)


def test_nothing_to_see_gives_zeros() -> None:
    window = FullSegment(torch.randn(1, 1, 3, 8), torch.randn(1, 1, 3, 8), torch.zeros(1, 1, 1, 3, dtype=torch.bool))
    found = KERNEL(torch.randn(1, 2, 1, 8), [window], 1.0)
    assert not found.output.any()
    assert bool((found.lse == -torch.inf).all())


@pytest.mark.parametrize(
    ("dtype", "dim", "device", "reason"),
    [
        (torch.float64, 64, "cpu", "float64"),
        (torch.float32, 20, "cpu", "head_dim 20"),
        (torch.float32, 64, "meta", "runs on a CPU"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_reason(dtype: torch.dtype, dim: int, device: str, reason: str) -> None:
    answer = KERNEL.supports(None, dim, torch.device(device), dtype)
    assert not answer
    assert reason in answer.reason


def test_a_refused_call_raises() -> None:
    with pytest.raises(InputError, match="nothing to attend to"):
        KERNEL(torch.randn(1, 1, 1, 64), [], 1.0)
    window = FullSegment(*(torch.randn(2, 1, 1, 64, 5).transpose(-1, -2)))
    with pytest.raises(InputError, match="side by side"):
        KERNEL(torch.randn(1, 1, 1, 64), [window], 1.0)


class Events(TelemetrySink):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


@pytest.mark.parametrize("max_cache_len", [None, 400])
@pytest.mark.parametrize("name", ["safe", "balanced", "aggressive"])
def test_presets_run_on_it_without_a_fallback(name: str, max_cache_len: int | None) -> None:
    shape = LlamaConfig(
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    model = LlamaForCausalLM(shape).eval()
    told = Events()
    prompt = torch.randint(99, (2, 210))
    logits = []
    for kind in ("torch", "cpu"):
        told.events.clear()
        config = FadeConfig.model_validate(getattr(FadeConfig, name)().model_dump() | {"kernel": {"kind": kind}})
        cache = create_tiered_cache(model, config, max_cache_len)
        cache.sinks.append(told)
        torch.manual_seed(1)
        with torch.no_grad():
            model(prompt, past_key_values=cache)
            steps = [model(torch.randint(99, (2, 1)), past_key_values=cache).logits for _ in range(90)]
        logits.append(torch.cat(steps, 1))
    assert not [e for e in told.events if e.kind == "fallback"]
    spread = float(logits[0].std())
    assert (logits[0] - logits[1]).abs().max() < 1e-3 * spread  # float32, 90 steps of two layers
