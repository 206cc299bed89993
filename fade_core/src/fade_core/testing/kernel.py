"""Conformance of kernels: another implementation never changes meaning. The torch one of the core is the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from fade_core.builtin.quantizers.uniform import UniformConfig
from fade_core.errors import InputError
from fade_core.interfaces import Kernel, Op, Quantizer, QuantizerContext, RopeScheme, Support, Tier
from fade_core.ops.buffers import AppendRule, StepBuffers
from fade_core.ops.reference import (
    AttentionOutput,
    FullSegment,
    PackedSegment,
    Segment,
    append,
    attention_mass,
    decode_attention,
)
from fade_core.packed import Packed, Tiles, unpack_meta
from fade_core.plugins import default_registry
from fade_core.storage.repositioning import Shift
from fade_core.storage.slots import TokenLayout
from fade_core.storage.tier_store import TierStore, Tokens
from fade_core.testing.checks import (
    CheckResult,
    NotApplicableError,
    Suite,
    fresh_seed,
    require,
    require_equal,
    unchanged,
)

ATTENTION: tuple[Op, ...] = ("decode_attention", "attention_mass")
CHECKED_OPS: tuple[Op, ...] = (*ATTENTION, "append", "encode", "dequantize")
KEYS, VALUES = UniformConfig(bits=4, axis="channel"), UniformConfig(bits=4)


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention problem."""

    batch: int = 2
    query_heads: int = 6
    heads: int = 3
    head_dim: int = 64
    queries: int = 1
    tiles: int = 3
    window: int = 37


@dataclass
class KernelCase:
    """A kernel under test, where it runs, and the generator of its inputs."""

    kernel: Kernel
    device: torch.device
    dtype: torch.dtype
    keys: UniformConfig
    values: UniformConfig
    generator: torch.Generator

    def supported(self, head_dim: int = 64, ops: tuple[Op, ...] = ATTENTION) -> None:
        """Raises ``NotApplicableError`` if the check is for other ops, or with the kernel's reason if it does not run here."""
        if self.kernel.op not in ops:
            raise NotApplicableError(f"is about {' and '.join(ops)}")
        keys = self.keys.build(QuantizerContext(head_dim, "key"))
        answer = self.kernel.supports(keys.format, head_dim, self.device, self.dtype)
        if not answer:
            raise NotApplicableError(f"does not run here: {answer.reason}")

    def randn(self, *shape: int) -> Tensor:
        """Random numbers of the case's dtype and device."""
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def query(self, shape: Shape) -> Tensor:
        """``[B, H_q, Q, D]``."""
        return self.randn(shape.batch, shape.query_heads, shape.queries, shape.head_dim)

    def segments(self, shape: Shape, *, flat: bool = False) -> list[Segment]:
        """Packed tiles of ragged rows, then a full-precision window with a mask."""
        dim = shape.head_dim
        contexts = QuantizerContext(dim, "key"), QuantizerContext(dim, "value")
        tier = Tier("int4", "rest", self.keys.build(contexts[0]), self.values.build(contexts[1]))
        store = TierStore(tier, shape.batch, TokenLayout(shape.heads, self.dtype, self.device), stores_positions=False)
        tile = tier.keys.tile
        length = shape.tiles * tile
        keys = self.randn(shape.batch, shape.heads, length, dim) * (0.01 if flat else 1)
        values = self.randn(shape.batch, shape.heads, length, dim) + (1 if flat else 0)
        counts = torch.full((shape.batch, shape.heads), length)
        if not flat and shape.tiles > 1:
            counts[-1] -= tile + 5  # the last row holds less, and its last tile is cut short
        positions = torch.arange(length, device=self.device).expand(shape.batch, 1, -1)
        store.append(Tokens(keys, values, positions, counts, {}))
        live = store.view().valid()
        mask = None if live is None else live[:, :, None].expand(-1, -1, shape.queries, -1)
        window = shape.window
        seen = torch.arange(window) <= torch.arange(window - shape.queries, window)[:, None]
        return [
            PackedSegment(store.view(), mask, plain=True),
            FullSegment(
                self.randn(shape.batch, shape.heads, window, dim),
                self.randn(shape.batch, shape.heads, window, dim),
                seen.expand(shape.batch, shape.heads, -1, -1).to(self.device) if shape.queries > 1 else None,
                plain=True,
            ),
        ]


def check_kernel(
    kernel: Kernel | type[Kernel] | str,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    keys: UniformConfig = KEYS,
    values: UniformConfig = VALUES,
    seed: int | None = None,
    expected_failures: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    only: tuple[str, ...] = (),
) -> list[CheckResult]:
    """Check an implementation of ``decode_attention``, ``attention_mass``, ``append``, ``encode`` or ``dequantize``.

    Args:
        kernel: the implementation, its class, or "OP:NAME" as it is installed.
        device: where to run; ``None`` takes the GPU if there is one.
        dtype: of queries and window; ``None`` for bfloat16 on a GPU, float32 elsewhere.
        keys: packed format of the keys.
        values: packed format of the values.
        seed: of the inputs; ``None`` draws one.
        expected_failures: checks that are known to fail, with the reason.
        progress: called as checks are done.
        only: names of the checks to run; empty for all.

    Raises:
        InputError: for an op that has no oracle with this signature.
    """
    found = _kernel(kernel)
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind = dtype if dtype is not None else (torch.bfloat16 if where.type == "cuda" else torch.float32)
    return KERNEL_CHECKS.run(
        lambda generator: KernelCase(found, where, kind, keys, values, generator),
        fresh_seed() if seed is None else seed,
        expected_failures,
        progress,
        only,
    )


# --- the checks ---


def support(case: KernelCase) -> None:
    """supports() answers any case with a Support, and gives the reason for every no."""
    for device in (torch.device("cpu"), torch.device("cuda"), torch.device("meta")):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for head_dim in (64, 80, 128, 256, 7):
                for packed in (None, case.keys.build(QuantizerContext(64, "key")).format):
                    answer = case.kernel.supports(packed, head_dim, device, dtype)
                    require(isinstance(answer, Support), f"supports() returned {type(answer).__name__}")
                    require(bool(answer) or bool(answer.reason), f"no without a reason: {device}, {dtype}, {head_dim}")


def agreement(case: KernelCase) -> None:
    """One query a row over ragged packed tiles and a window: as exact as the oracle in the same dtype."""
    case.supported()
    _agrees(case, Shape())


def several_queries(case: KernelCase) -> None:
    """A few queries a row with a causal mask in the window."""
    case.supported()
    _agrees(case, Shape(queries=5))


def head_shapes(case: KernelCase) -> None:
    """Other head dimensions, grouped and ungrouped heads, one row; every head_dim that is supported."""
    case.supported()
    for shape in (
        Shape(batch=1, query_heads=2, heads=2),
        Shape(batch=1, query_heads=8, heads=1, tiles=1, window=1),
        Shape(query_heads=14, heads=2, head_dim=128),
        Shape(batch=1, query_heads=4, heads=1, head_dim=256),
    ):
        keys = case.keys.build(QuantizerContext(shape.head_dim, "key"))
        if case.kernel.supports(keys.format, shape.head_dim, case.device, case.dtype):
            _agrees(case, shape)


def softcap_and_sinks(case: KernelCase) -> None:
    """Logits capped by tanh, and extra sink logits that take mass."""
    case.supported()
    _agrees(case, Shape(), softcap=20.0)
    if case.kernel.op == "decode_attention":
        _agrees(case, Shape(), sinks=torch.randn(6, generator=case.generator).to(case.device))


def long_and_flat(case: KernelCase) -> None:
    """Nearly equal weights over thousands of tokens, where sums lose what short tests do not show."""
    case.supported()
    _agrees(case, Shape(batch=1, query_heads=2, heads=1, tiles=96), flat=True)


def window_only(case: KernelCase) -> None:
    """A window with no packed tier beside it."""
    case.supported()
    _agrees(case, Shape(), packed=False)


def moved_keys(case: KernelCase) -> None:
    """Packed keys that are read at other positions, if the kernel declares ``shifts``: the oldest ones of each row and head."""
    case.supported()
    if not case.kernel.shifts:
        raise NotApplicableError("the kernel does not declare shifts; the core never gives it moved keys")
    _agrees(case, Shape(), moved=71)
    _agrees(case, Shape(queries=5, tiles=2), moved=128)


class _Turning(RopeScheme):
    """A rotary embedding of pairs ``(i, i + D/2)``, as the check has it."""

    kind = "checked"

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        first, second = x.double().chunk(2, -1)
        rates = 10_000.0 ** (-torch.arange(first.shape[-1], device=x.device).double() / first.shape[-1])
        angle = positions[..., None] * rates
        turned = torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)
        return turned.to(x.dtype)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rotate(x, -positions)


def inputs_kept(case: KernelCase) -> None:
    """Nothing that was passed in is changed."""
    case.supported()
    shape = Shape()
    query, segments = case.query(shape), case.segments(shape)
    window = segments[-1]
    if not isinstance(window, FullSegment):
        raise InputError("the last segment is the window")
    check = unchanged("the call", query, window.keys, window.values)
    _call(case, query, segments)
    check()


def determinism(case: KernelCase) -> None:
    """The same inputs give the same bits."""
    case.supported()
    shape = Shape()
    query, segments = case.query(shape), case.segments(shape)
    require_equal(_call(case, query, segments), _call(case, query, segments), "calling again")


def appending(case: KernelCase) -> None:
    """Tokens come in and the oldest tiles go out where the window is full; codes are the oracle's, or a step off, rarely.

    Tiles lie one after the other, or anywhere in a pool whose unwritten tiles are NaN; then heads have numbers of their own,
    several tokens come at once and two tiles leave at once.
    """
    case.supported(ops=("append",))
    for rows, heads, head_dim, runs in ((3, 2, 64, True), (1, 1, 128, True), (3, 2, 64, False)):
        rule, ours = _buffers(case, rows, heads, head_dim, runs)
        theirs, before = ours.clone(), ours.clone()
        for count in (1, 1, 1) if runs else (1, 5, 1):
            keys, values = (case.randn(rows, heads, count, head_dim) for _ in range(2))
            if not case.kernel.accepts(keys, values, ours, rule):
                raise NotApplicableError(case.kernel.accepts(keys, values, ours, rule).reason)
            case.kernel(keys, values, ours, rule)
            append(keys, values, theirs, rule)
        for name in ("lengths", "used", "counters", "starts", "tile_positions"):
            if getattr(theirs, name) is not None:
                require_equal(getattr(ours, name), getattr(theirs, name), f"{name} after three calls")
        slots = torch.arange(ours.keys.shape[2], device=case.device) < ours.lengths[..., None]
        require_equal(ours.keys[slots], theirs.keys[slots], "keys of the window")
        require_equal(ours.values[slots], theirs.values[slots], "values of the window")
        require_equal(ours.positions[slots[:, 0]], theirs.positions[slots[:, 0]], "positions of the window")
        for mine, wanted in zip(ours.window_notes, theirs.window_notes, strict=True):
            require_equal(mine[slots], wanted[slots], "notes of the window")
        for mine, wanted in zip(ours.tile_notes, theirs.tile_notes, strict=True):
            require_equal(mine, wanted, "notes of the tiles")
        tiles = torch.arange(ours.ids.shape[2], device=case.device)
        fresh = (tiles >= before.used[..., None]) & (tiles < ours.used[..., None])
        written = ours.ids[fresh].long()  # [P]
        untouched = torch.ones(len(ours.key_fields["meta"]), dtype=torch.bool, device=case.device)
        untouched[written] = False
        for side, found, oracle, old in (
            (rule.packed.keys, ours.key_fields, theirs.key_fields, before.key_fields),
            (rule.packed.values, ours.value_fields, theirs.value_fields, before.value_fields),
        ):
            parts = [{name: field[written][None, None] for name, field in f.items()} for f in (found, oracle)]
            _same_codes(side, parts[0], parts[1], len(written) * rule.tile, torch.ones_like(written, dtype=torch.bool))
            for name, field in found.items():
                require_equal(field[untouched], old[name][untouched], f"{name} of tiles that are not written")


def encoding(case: KernelCase) -> None:
    """A prompt's tokens, strided as a model's, the last tile cut short: codes are the quantizer's, or a step off, rarely.

    To new tensors, and to places in a pool of NaN; tiles without a place are not written, nor is anything else.
    """
    case.supported(ops=("encode",))
    for rows, heads, head_dim, length in ((3, 2, 64, 150), (1, 1, 128, 1), (2, 3, 80, 64)):
        contexts = QuantizerContext(head_dim, "key"), QuantizerContext(head_dim, "value")
        for quantizer in (case.keys.build(contexts[0]), case.values.build(contexts[1])):
            tokens = case.randn(rows, length, heads, head_dim).transpose(1, 2)
            if not case.kernel.accepts(quantizer, tokens):
                raise NotApplicableError(case.kernel.accepts(quantizer, tokens).reason)
            check = unchanged("the call", tokens)
            found, wanted = case.kernel(quantizer, tokens), quantizer.encode(tokens)
            check()
            require(found.length == length, f"{found.length} tokens; {length} were given")
            live = torch.arange(-(-length // quantizer.tile), device=case.device) >= 0
            held = found.fields["meta"].shape[2] * quantizer.tile
            _same_codes(quantizer, found.fields, wanted.fields, held, live)
            pool, ids = _pool(case, wanted.fields)
            ids[0, -1] = -1
            if not case.kernel.accepts(quantizer, tokens, Tiles(pool, ids)):
                continue
            require(
                case.kernel(quantizer, tokens, Tiles(pool, ids)) is None,
                "tiles that went into a pool were returned too",
            )
            there = ids >= 0
            placed = {name: field[ids.clamp_min(0).long()] for name, field in pool.items()}  # [B, H_kv, n, *tile_shape]
            if bool(there.any()):
                _same_codes(quantizer, placed, wanted.fields, held, there)
            untouched = torch.ones(len(pool["meta"]), dtype=torch.bool, device=case.device)
            untouched[ids[there].long()] = False
            require(all(bool((f[untouched] == -1).all()) for f in pool.values()), "tiles without a place were written")


def _pool(case: KernelCase, fields: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """A pool with room for tiles ``[B, H_kv, n, ...]`` and three more, of NaN, and a table of it in random order."""
    lead = next(iter(fields.values())).shape[:3]
    count = lead.numel() + 3
    pool = {
        name: torch.full((count, *field.shape[3:]), -1, dtype=field.dtype, device=case.device)
        for name, field in fields.items()
    }
    ids = torch.randperm(count, generator=case.generator)[: lead.numel()].int().view(lead)
    return pool, ids.to(case.device)


def decoding(case: KernelCase) -> None:
    """Packed tokens come back as the quantizer decodes them, in their dtype, the last tile cut short; views too.

    Through a table as well, out of a pool whose other tiles are NaN; zeros where there is no tile.
    """
    case.supported(ops=("dequantize",))
    for rows, heads, head_dim, length in ((3, 2, 64, 150), (1, 1, 128, 1), (2, 3, 80, 64)):
        contexts = QuantizerContext(head_dim, "key"), QuantizerContext(head_dim, "value")
        for quantizer in (case.keys.build(contexts[0]), case.values.build(contexts[1])):
            packed = quantizer.encode(case.randn(rows, heads, length + 2 * quantizer.tile, head_dim))
            tiles = -(-length // quantizer.tile)
            part = Packed({n: f[:, :, 1 : 1 + tiles] for n, f in packed.fields.items()}, length, case.dtype)
            if not case.kernel.accepts(quantizer, part):
                raise NotApplicableError(case.kernel.accepts(quantizer, part).reason)
            check = unchanged("the call", *part.fields.values())
            found, wanted = case.kernel(quantizer, part), quantizer.decode(part)
            check()
            _same_tokens(case, found, wanted)
            pool, ids = _pool(case, part.fields)
            for name, field in part.fields.items():
                pool[name][ids.long()] = field
            ids[0, -1] = -1
            if case.kernel.accepts(quantizer, Packed(pool, length, case.dtype), ids):
                wanted[0, -1] = 0
                _same_tokens(case, case.kernel(quantizer, Packed(pool, length, case.dtype), ids), wanted)


def _same_tokens(case: KernelCase, found: Tensor, wanted: Tensor) -> None:
    """Tokens are those that are wanted, but for one rounding."""
    require(found.dtype == wanted.dtype, f"{found.dtype}; {wanted.dtype} is needed")
    require(found.shape == wanted.shape, f"{tuple(found.shape)}; {tuple(wanted.shape)} is needed")
    allowed = 2 * torch.finfo(case.dtype).eps * float(wanted.abs().max())
    error = float((found.double() - wanted.double()).abs().max())
    require(error <= allowed, f"error {error:.3g}; {allowed:.3g} is allowed")


def _same_codes(
    side: Quantizer, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], length: int, tiles: Tensor
) -> None:
    """Codes of ``tiles`` (bool over ``[B, H_kv, n]``) are at most one step apart, and few are."""
    tiles = tiles.expand(wanted["meta"].shape[:3])
    decoded = [side.decode(Packed(dict(f), length, torch.float32)) for f in (found, wanted)]
    apart = (decoded[0] - decoded[1]).unflatten(2, (tiles.shape[2], -1))[tiles].abs()
    step = unpack_meta(wanted["meta"][tiles])[0].max()
    most = float(apart.max())
    require(most <= 1.1 * float(step), f"codes are {most:.3g} apart, where a step is {float(step):.3g}")
    few = float((apart > 0.5 * step).float().mean())
    require(few < 0.01, f"{few:.1%} of the codes are not the oracle's; 1% may lie on an edge")


KERNEL_CHECKS: Suite[KernelCase] = Suite(
    (
        *(support, agreement, several_queries, head_shapes, softcap_and_sinks, long_and_flat, window_only),
        *(moved_keys, inputs_kept, determinism, appending, encoding, decoding),
    )
)


def _buffers(case: KernelCase, rows: int, heads: int, head_dim: int, runs: bool) -> tuple[AppendRule, StepBuffers]:
    """Rows of which the first has a full window, with room for two tiles a head; what is not in use is NaN.

    Without ``runs`` the first row's window holds a tile more than that, heads have other numbers of tiles, and these lie
    anywhere in a larger pool.
    """
    keys = case.keys.build(QuantizerContext(head_dim, "key"))
    values = case.values.build(QuantizerContext(head_dim, "value"))
    rule = AppendRule(Tier("int4", "rest", keys, values), 4, 4 + 20 + keys.tile)
    capacity = rule.threshold + keys.tile + 8
    window = tuple(case.randn(rows, heads, capacity, head_dim) for _ in range(2))
    lengths = torch.tensor([rule.threshold - row for row in range(rows)], dtype=torch.int32, device=case.device)
    used = torch.zeros((rows, heads), dtype=torch.int32, device=case.device)
    count = 2 if runs else 2 + heads
    ids = torch.arange(rows * heads * count, dtype=torch.int32)
    if not runs:
        lengths[0] += keys.tile
        used += torch.arange(heads, dtype=torch.int32, device=case.device)
        ids = torch.randperm(len(ids) + 3, generator=case.generator)[: len(ids)].int()
    ids = ids.view(rows, heads, count).to(case.device)
    for held in window:
        past = torch.arange(capacity, device=case.device) >= lengths[:, None]
        held[past[:, None].expand(-1, heads, -1)] = torch.nan
    fields = [
        {
            # codes and fp16 scales of all ones: the scales are NaN
            name: torch.full((ids.numel() + (0 if runs else 3), *shape), -1, dtype=dtype, device=case.device)
            for name, (shape, dtype) in quantizer.field_shapes().items()
        }
        for quantizer in (keys, values)
    ]
    note = torch.rand(rows, heads, capacity, generator=case.generator).to(case.device)
    return rule, StepBuffers(
        window[0],
        window[1],
        torch.arange(100, 100 + rows * capacity, dtype=torch.int32, device=case.device).view(rows, capacity),
        lengths[:, None].expand(-1, heads).contiguous(),
        torch.tensor([900, 0, 0], device=case.device),
        fields[0],
        fields[1],
        ids,
        used,
        used + 2,
        starts=torch.full_like(ids, -1) if runs else None,
        tile_positions=None if runs else torch.full_like(ids, -1)[..., None].repeat(1, 1, 1, keys.tile),
        window_notes=[] if runs else [note],
        tile_notes=[] if runs else [torch.zeros(rows, heads, count, keys.tile, device=case.device)],
        runs=runs,
    )


def _agrees(
    case: KernelCase,
    shape: Shape,
    *,
    flat: bool = False,
    packed: bool = True,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    moved: int = 0,
) -> None:
    """The kernel's error is at most twice the oracle's own, both against the oracle in float64, its query too.

    Packed keys of the first ``moved`` slots are moved by up to a thousand positions, each by its own number.
    """
    query, segments = case.query(shape), case.segments(shape, flat=flat)
    segments = segments if packed else segments[1:]
    if moved and isinstance(segments[0], PackedSegment):
        far = torch.randint(0, 1000, (shape.batch, shape.heads, moved), generator=case.generator, dtype=torch.int32)
        segments[0] = replace(segments[0], shift=Shift(_Turning(), far.to(case.device)))
    scaling = shape.head_dim**-0.5
    precise = decode_attention(query.double(), [_double(s) for s in segments], scaling, softcap, sinks)
    for number, (found, oracle, wanted, what) in enumerate(
        _pairs(case, query, segments, scaling, softcap, sinks, precise)
    ):
        require(found.shape == wanted.shape, f"{what}: {tuple(found.shape)}, {tuple(wanted.shape)} is needed")
        require(bool(found.isfinite().all()), f"{what} is not finite")
        own = float((oracle.double() - wanted.double()).abs().max())
        floor = 4 * torch.finfo(case.dtype).eps * float(wanted.double().abs().max())
        error = float((found.double() - wanted.double()).abs().max())
        require(error <= 2 * own + floor, f"{what}: error {error:.3g}; {2 * own + floor:.3g} is allowed ({shape})")
        del number


def _pairs(
    case: KernelCase,
    query: Tensor,
    segments: list[Segment],
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    precise: AttentionOutput,
) -> Iterator[tuple[Tensor, Tensor, Tensor, str]]:
    """What the kernel gave, what the oracle gives in the same dtype, what is exact, and its name."""
    if case.kernel.op == "attention_mass":
        for segment, name in zip(segments, ("packed", "window")[-len(segments) :], strict=True):
            lse, arguments = precise.lse.float(), (scaling, softcap)
            found = case.kernel(query, segment, lse, *arguments)
            oracle = attention_mass(query, segment, lse, *arguments)
            wanted = attention_mass(query.double(), _double(segment), precise.lse, *arguments)
            yield found, oracle, wanted, f"mass of the {name}"
        return
    result = case.kernel(query, segments, scaling, softcap=softcap, sinks=sinks)
    oracle_result = decode_attention(query, segments, scaling, softcap, sinks)
    yield result.output, oracle_result.output, precise.output, "output"
    yield result.lse, oracle_result.lse, precise.lse, "log-sum-exp"


def _call(case: KernelCase, query: Tensor, segments: list[Segment]) -> Tensor:
    scaling = query.shape[-1] ** -0.5
    if case.kernel.op == "attention_mass":
        lse = decode_attention(query, segments, scaling).lse
        mass: Tensor = case.kernel(query, segments[0], lse, scaling)
        return mass
    output: Tensor = case.kernel(query, segments, scaling).output
    return output


def _double(segment: Segment) -> Segment:
    """The same tokens, the packed ones decoded, in float64."""
    if isinstance(segment, FullSegment):
        return replace(segment, keys=segment.keys.double(), values=segment.values.double())
    keys, values = segment.store.packed()
    tier = segment.store.tier
    full = (
        tier.keys.decode(replace(keys, dtype=torch.float64)),
        tier.values.decode(replace(values, dtype=torch.float64)),
    )
    if segment.shift is not None:
        full = segment.shift.moved(full[0]), full[1]
    return FullSegment(*full, mask=segment.mask)


def _kernel(kernel: Any) -> Kernel:
    if isinstance(kernel, str):
        kernel = _installed(kernel)
    if isinstance(kernel, type) and issubclass(kernel, Kernel):
        kernel = kernel()
    if not isinstance(kernel, Kernel):
        raise InputError(f"a kernel, its class or OP:NAME is needed; found {kernel!r}")
    if kernel.op not in CHECKED_OPS:
        raise InputError(f"op {kernel.op!r} has no oracle to check against; checked are {', '.join(CHECKED_OPS)}")
    return kernel


def _installed(name: str) -> Any:
    if ":" not in name:
        ops = [op for op in get_args(Op) if default_registry().has("kernels", f"{op}:{name}")]
        if len(ops) != 1:
            raise InputError(f"kernel {name!r}: say which op, such as {(ops or CHECKED_OPS)[0]}:{name}")
        name = f"{ops[0]}:{name}"
    return default_registry().get("kernels", name)
