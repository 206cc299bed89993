"""The append kernel writes what the torch oracle writes, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from oracle import seed
from torch import Tensor

from fade_core import AppendRule, StepBuffers, Tier, append
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import InputError
from fade_core.interfaces import PlainEncoding
from fade_core.packed import Packed, pack_meta, unpack_codes, unpack_meta
from fade_kernels_triton.append import TritonAppend

SINK, RECENT = 4, 24


def problem(
    rows: int, heads: int, tiles: int, dim: int, bits: int | tuple[int, int], axis: str, tile: int, dtype: torch.dtype,
    device: str, spread: float = 1.0, on_nonfinite: str = "raise", runs: bool = True, group: int = 0,
) -> tuple[AppendRule, StepBuffers]:  # fmt: skip
    """Rows about to be full; whatever is not in use is NaN. Without ``runs`` as ``buffers`` says."""
    key_bits, value_bits = (bits, bits) if isinstance(bits, int) else bits
    key_codes = UniformQuantizer(dim, key_bits, axis, tile=tile)  # type: ignore[arg-type]
    value_codes = UniformQuantizer(dim, value_bits, group=group, tile=tile, layout="channel")
    rule = AppendRule(Tier("int", "rest", key_codes, value_codes), SINK, SINK + RECENT + tile, on_nonfinite)
    channels = [3 * torch.randn(1, heads, 1, dim, device=device) for _ in range(2)]
    capacity = rule.threshold + tile + 7
    window = [(torch.randn(rows, heads, capacity, dim, device=device) * spread + c).to(dtype) for c in channels]
    lengths = torch.full((rows,), rule.threshold, dtype=torch.int32, device=device)
    lengths[1:] -= torch.randint(0, 3, (max(rows - 1, 0),), dtype=torch.int32, device=device)
    return rule, buffers(rule, window, lengths, tiles, runs)


def buffers(
    rule: AppendRule, window: list[Tensor], lengths: Tensor, tiles: int, runs: bool, ragged: bool = True
) -> StepBuffers:
    """Windows of ``lengths`` ``[B]`` tokens; what is not in use is NaN, and so is every packed tile.

    Without ``runs`` the first row's window holds a tile more, so that two leave at once, tiles lie anywhere in a larger pool,
    heads have numbers of their own if they are ``ragged``, and two kinds of notes go with the tokens.
    """
    rows, heads, capacity, _ = window[0].shape
    device = lengths.device
    used = torch.randint(0, tiles, (rows, 1), dtype=torch.int32, device=device).expand(-1, heads).contiguous()
    reserved = torch.full_like(used, tiles)
    spare = 0 if runs else 5
    count = rows * heads * tiles
    ids = torch.arange(count, dtype=torch.int32, device=device).view(rows, heads, tiles)
    if not runs:
        lengths[0] += rule.tile
        used[0] = 0
        less = torch.arange(heads, dtype=torch.int32, device=device).clamp_max(used) * ragged  # [B, H_kv]
        used, reserved = used - less, reserved - less
        ids = torch.randperm(count + spare, device=device)[:count].int().view(rows, heads, tiles)
        ids[torch.arange(tiles, device=device) >= reserved[..., None]] = -1  # not to be used
    for held in window:
        past = torch.arange(capacity, device=device) >= lengths[:, None]
        held[past[:, None].expand(-1, heads, -1)] = torch.nan
    fields = [
        {
            name: torch.full((count + spare, *shape), -1, dtype=kind, device=device)
            for name, (shape, kind) in q.field_shapes().items()
        }
        for q in (rule.tier.keys, rule.tier.values)
    ]
    notes = (torch.rand(rows, heads, capacity, device=device), torch.randint(0, 99, (rows, heads, capacity)).int())
    return StepBuffers(
        *window,
        torch.arange(rows * capacity, dtype=torch.int32, device=device).view(rows, capacity) * 2,
        lengths[:, None].expand(-1, heads).contiguous(),
        torch.tensor([70_000, 0, 0], device=device),
        *fields,
        ids,
        used,
        reserved,
        starts=torch.full_like(ids, -1) if runs else None,
        tile_positions=None if runs else torch.full((rows, heads, tiles, rule.tile), -1).int().to(device),
        window_notes=[] if runs else [note.to(device) for note in notes],
        tile_notes=[] if runs else [note.new_zeros(rows, heads, tiles, rule.tile).to(device) for note in notes],
        runs=runs,
    )


def same(ours: StepBuffers, theirs: StepBuffers) -> None:
    """Every bit in use is alike, and what is not in use was not touched where no tile has gone."""
    same_but_codes(ours, theirs)
    for mine, his in ((ours.key_fields, theirs.key_fields), (ours.value_fields, theirs.value_fields)):
        for name, field in mine.items():
            assert torch.equal(field, his[name]), name


def same_but_codes(ours: StepBuffers, theirs: StepBuffers) -> None:
    for name in ("lengths", "used", "counters", "starts", "tile_positions"):
        if getattr(ours, name) is not None:
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    live = torch.arange(ours.keys.shape[2], device=ours.keys.device) < ours.lengths[..., None]
    for mine, his in zip(
        (ours.keys, ours.values, *ours.window_notes), (theirs.keys, theirs.values, *theirs.window_notes), strict=True
    ):
        assert torch.equal(mine[live], his[live])
    assert torch.equal(ours.positions[live[:, 0]], theirs.positions[live[:, 0]])
    for mine, his in zip(ours.tile_notes, theirs.tile_notes, strict=True):
        assert torch.equal(mine, his)


CASES = [
    (4, "channel", 64, 128, torch.bfloat16, 0),
    ((3, 2), "token", 64, 64, torch.float16, 32),
    (2, "channel", 128, 128, torch.float16, 0),
    (2, "token", 64, 80, torch.float32, 0),
    ((3, 2), "channel", 128, 96, torch.float32, 0),
    ((4, 2), "channel", 64, 256, torch.float16, 64),
    (4, "token", 64, 64, torch.float16, 0),
]


@pytest.mark.parametrize(("bits", "axis", "tile", "dim", "dtype", "group"), CASES)
def test_the_kernel_is_the_oracle(
    bits: Any, axis: str, tile: int, dim: int, dtype: torch.dtype, group: int, device: str
) -> None:
    seed()
    rule, ours = problem(3, 2, 4, dim, bits, axis, tile, dtype, device, group=group)
    _steps(rule, ours, (1, 1, 1, 1, 1))
    assert bool((ours.lengths < rule.threshold).all())


@pytest.mark.parametrize(("bits", "axis", "tile", "dim", "dtype", "group"), CASES[:3])
def test_tiles_go_where_the_table_says(
    bits: Any, axis: str, tile: int, dim: int, dtype: torch.dtype, group: int, device: str
) -> None:
    """Several tokens at once, two tiles at once, heads with numbers of their own; positions and notes go along."""
    seed()
    rule, ours = problem(3, 3, 4, dim, bits, axis, tile, dtype, device, runs=False, group=group)
    before = ours.clone()
    _steps(rule, ours, (1, 3, 2))
    assert (ours.used - before.used)[0].tolist() == [2, 2, 2]
    fresh = torch.arange(4, device=device) >= before.used[..., None]
    fresh &= torch.arange(4, device=device) < ours.used[..., None]
    assert bool((ours.key_fields["meta"][ours.ids[fresh].long()] != -1).any(-1).all())
    assert int((ours.key_fields["meta"] != -1).flatten(1).any(1).sum()) == int(fresh.sum())


def test_a_draft_of_32_tokens_comes_at_once(device: str) -> None:
    seed()
    rule, ours = problem(2, 2, 4, 64, 4, "token", 64, torch.float16, device)
    ours.lengths.fill_(40)
    _steps(rule, ours, (32,))


def test_a_layer_without_tiles_only_fills_its_window(device: str) -> None:
    seed()
    rule, ours = problem(2, 2, 4, 64, 4, "token", 64, torch.float16, device)
    rule = AppendRule(rule.tier, rule.n_sink, 2**30)
    none, ids = torch.zeros_like(ours.used), ours.ids[..., :0].contiguous()
    ours = replace(ours, key_fields={}, value_fields={}, ids=ids, used=none, reserved=none, starts=ids)
    _steps(rule, ours, (1, 2))


def _steps(rule: AppendRule, ours: StepBuffers, counts: tuple[int, ...]) -> None:
    """Give the kernel and the oracle the same tokens, so many a step."""
    theirs, kernel = ours.clone(), TritonAppend()
    rows, heads, _, dim = ours.keys.shape
    for count in counts:
        new = torch.randn(2, rows, count, heads, dim, device=ours.keys.device).to(ours.keys.dtype)
        new = new.transpose(2, 3)  # as a model has it: [B, T, H, D] inside
        assert kernel.accepts(*new, ours, rule)
        kernel(*new, ours, rule)
        append(*new, theirs, rule, on_host=False)
        same(ours, theirs)


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e5])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_flat_tiny_and_huge_tokens(spread: float, axis: str, device: str) -> None:
    """Scales of zero, subnormal ones, and those that end at fp16's largest."""
    seed()
    rule, ours = problem(1, 2, 2, 64, 4, axis, 64, torch.float32, device, spread)
    ours.keys[:, 0] = 0.25
    theirs = ours.clone()
    new = torch.randn(2, 1, 2, 1, 64, device=device)
    TritonAppend()(*new, ours, rule)
    append(*new, theirs, rule, on_host=False)
    same(ours, theirs)


@pytest.mark.parametrize("on_nonfinite", ["raise", "zero"])
def test_what_is_not_finite_is_counted_or_zero(on_nonfinite: str, device: str) -> None:
    seed()
    rule, ours = problem(2, 2, 2, 64, 4, "token", 64, torch.float16, device, on_nonfinite=on_nonfinite)
    ours.lengths.fill_(9)
    theirs = ours.clone()
    new = torch.randn(2, 2, 2, 1, 64, device=device).half()
    new[0, 1, 0, 0, 3], new[1, 0, 1, 0, 63] = torch.inf, torch.nan
    TritonAppend()(*new, ours, rule)
    append(*new, theirs, rule, on_host=False)
    assert (int(ours.counters[1]) > 0) == (int(theirs.counters[1]) > 0) == (on_nonfinite == "raise")
    ours.counters[1] = theirs.counters[1]  # tokens here, steps there
    for held in (ours, theirs):
        held.keys.nan_to_num_()
        held.values.nan_to_num_()
    same(ours, theirs)


class Turned(UniformQuantizer):
    """Codes of tokens turned by a random orthogonal matrix, scales rounded to nearest: as a plugin's may be."""

    kind = "turned"

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.turn = torch.linalg.qr(torch.randn(self.head_dim, self.head_dim)).Q.contiguous()

    def plain_encoding(self, device: torch.device) -> PlainEncoding:
        return PlainEncoding(self.turn, outward=False)

    def encode(self, x: Tensor) -> Packed:
        x = x.float() @ self.turn
        low, high = torch.aminmax(x, dim=-1, keepdim=True)
        top = 2**self.bits - 1
        minimum = low.half()
        scale = ((high - minimum.float()) / top).half()
        codes = ((x - minimum.float()) / scale.float()).round().clamp(0, top).to(torch.int16)
        tiles = [t.unflatten(2, (-1, self.tile)) for t in (codes, scale, minimum)]
        fields = self._pack(tiles[0])
        fields["meta"] = pack_meta(*(t.transpose(-1, -2) for t in tiles[1:]))
        return Packed(fields, x.shape[2], x.dtype)


@pytest.mark.parametrize(("bits", "tile", "dim"), [(4, 64, 64), (4, 128, 80), (2, 128, 128)])
def test_tokens_are_turned_before_they_are_encoded(bits: int, tile: int, dim: int, device: str) -> None:
    """Sums in another order: a code or a scale may be one step off, rarely."""
    seed()
    rule, ours = problem(2, 2, 3, dim, bits, "token", tile, torch.float16, device)
    sides = Turned(dim, bits, tile=tile), Turned(dim, bits, tile=tile, layout="channel")
    for side in sides:
        side.turn = side.turn.to(device)
    rule = AppendRule(Tier("turned", "rest", *sides), rule.n_sink, rule.threshold)
    ours.lengths.fill_(rule.threshold)
    ours.keys.nan_to_num_()
    ours.values.nan_to_num_()
    theirs = ours.clone()
    new = torch.randn(2, 2, 2, 1, dim, device=device).half()
    assert TritonAppend().accepts(*new, ours, rule)
    TritonAppend()(*new, ours, rule)
    append(*new, theirs, rule, on_host=False)
    assert torch.equal(ours.lengths, theirs.lengths)
    for side, mine, his in zip(
        sides, (ours.key_fields, ours.value_fields), (theirs.key_fields, theirs.value_fields), strict=True
    ):
        at = ours.ids.cpu().gather(2, ours.used.cpu()[..., None].long() - 1)[..., 0].long()  # [B, H_kv]
        codes = [unpack_codes(f[f"codes{bits}"][at].cpu(), bits, side.fmt.layout).int() for f in (mine, his)]
        assert int((codes[0] - codes[1]).abs().max()) <= 1
        assert float((codes[0] != codes[1]).float().mean()) < 0.002
        for found, wanted in zip(*(unpack_meta(f["meta"][at].cpu()) for f in (mine, his)), strict=True):
            assert int((found.view(torch.int16).int() - wanted.view(torch.int16).int()).abs().max()) <= 1


def test_a_full_store_lets_the_window_fill_up_and_writes_nowhere_else(device: str) -> None:
    seed()
    rule, ours = problem(1, 2, 2, 64, 4, "channel", 64, torch.float16, device)
    ours.used.fill_(2)
    ours.lengths.fill_(ours.keys.shape[2] - 4)
    ours.keys.nan_to_num_()
    ours.values.nan_to_num_()
    theirs, before = ours.clone(), ours.lengths.clone()
    for _ in range(7):
        new = torch.randn(2, 1, 2, 1, 64, device=device).half()
        TritonAppend()(*new, ours, rule)
        append(*new, theirs, rule, on_host=False)
    assert torch.equal(ours.keys, theirs.keys)
    for name, field in ours.key_fields.items():
        assert torch.equal(field, theirs.key_fields[name])
    assert torch.equal(ours.lengths, before + 7)


def test_what_it_does_not_take_is_refused_with_the_reason(device: str) -> None:
    kernel = TritonAppend()
    rule, held = problem(1, 2, 2, 64, 4, "channel", 64, torch.float16, device)
    new = torch.randn(1, 2, 1, 64, device=device).half()
    assert kernel.supports(rule.tier.keys.format, 64, torch.device(device), torch.float16)
    assert "head_dim 48" in kernel.supports(None, 48, torch.device(device), torch.float16).reason
    eight = UniformQuantizer(64, 8, "channel")
    assert "8-bit" in kernel.supports(eight.format, 64, torch.device(device), torch.float16).reason
    many = torch.cat([new] * 33, 2)
    assert "33 tokens" in kernel.accepts(many, many, held, rule).reason
    with pytest.raises(InputError, match="33 tokens"):
        kernel(many, many, held, rule)
    wide = replace(
        held, window_notes=[new.new_zeros(1, 2, held.keys.shape[2])], tile_notes=[new.new_zeros(1, 2, 2, 64)]
    )
    assert "4 bytes" in kernel.accepts(new, new, wide, rule).reason

    class Own(UniformQuantizer):
        kind = "own"

        def encode(self, x: Tensor) -> Any:
            return super().encode(x)

    own = AppendRule(Tier("int", "rest", Own(64, 4, "channel"), rule.tier.values), SINK, rule.threshold)
    assert "'own' has a way of its own" in kernel.accepts(new, new, held, own).reason


_COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from fade_kernels_triton.jit.append import append_kernel
from fade_kernels_triton.jit.appendplanes import append_planes_kernel

POINTERS = {"KEY_CODES": "*i16", "KEY_LOW": "*i16", "VALUE_CODES": "*i16", "COUNTERS": "*i64", "KEY_META": "*i32",
            "VALUE_META": "*i32", "KEY_GAIN": "*u8", "VALUE_GAIN": "*u8"}
POINTERS |= dict.fromkeys(("LENGTHS", "USED", "RESERVED", "POSITIONS", "IDS"), "*i32")
for side in ("KEY", "VALUE"):
    POINTERS |= dict.fromkeys((f"{side}_TABLE", f"{side}_SLOTS", f"{side}_WIDTHS"), "*i32")
    numbers = ("STEPS", "WORTH", "MEAN", "DEVIATION", "USUAL")
    POINTERS |= dict.fromkeys((f"{side}_{name}" for name in numbers), "*fp32") | {f"{side}_FORWARD": "*fp16"}
WINDOW = dict.fromkeys(("KEYS", "VALUES", "W_KEYS", "W_VALUES"), "*bf16")
SHARED = dict(TILE=64, BLOCK=16, MOST=32, ZERO=False, D=128, DP=128)
CODES = dict(KEY_ROTATION=None, VALUE_ROTATION=None, VALUE_LOW=None, KEY_CHANNEL=True, KEY_OUTWARD=True, VALUE_OUTWARD=True)
ALIKE = CODES | dict(KEY_BITS=4, VALUE_BITS=4, VALUE_GROUPS=1, KEY_LOW=None)
APART = CODES | dict(KEY_BITS=3, VALUE_BITS=2, VALUE_GROUPS=4)
GAINS = (8, 4, -1, 3)
PLANES = dict(KEY_PLANES=10, VALUE_PLANES=9, KEY_GAINS=GAINS, VALUE_GAINS=GAINS, KEY_KEPT=128, VALUE_KEPT=64)
for kernel, fixed, runs, notes in (
    (append_kernel, ALIKE, True, 0), (append_kernel, APART, False, 2),
    (append_planes_kernel, PLANES, True, 0), (append_planes_kernel, PLANES, False, 2),
):
    names = kernel.arg_names
    pointers = POINTERS | WINDOW
    one, none = ("TILE_POSITIONS", "STARTS") if notes else ("STARTS", "TILE_POSITIONS")
    pointers |= {one: "*i32"} | dict.fromkeys(("WINDOW_NOTES", "TILE_NOTES"), ("*i32",) * notes)
    constants = SHARED | fixed | {"RUNS": runs, none: None}
    kinds = {n: "constexpr" if n in constants else pointers.get(n, "i32") for n in names}
    source = ASTSource(kernel, kinds, {(names.index(n),): v for n, v in constants.items()})
    print(len(triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["cubin"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_it_compiles_for_hopper_without_one() -> None:
    """In a process of its own: here Triton may be told to interpret."""
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sizes = [int(line) for line in done.stdout.split()]
    assert len(sizes) == 4 and min(sizes) > 1000
