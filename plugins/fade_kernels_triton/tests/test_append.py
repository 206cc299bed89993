"""The append kernel writes what the torch oracle writes, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from oracle import seed
from torch import Tensor

from fade_core import AppendRule, FixedBuffers, Tier, append
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import InputError
from fade_core.interfaces import PlainEncoding
from fade_core.packed import Packed, pack_meta, unpack_codes, unpack_meta
from fade_kernels_triton.append import TritonAppend

SINK, RECENT = 4, 24


def problem(
    rows: int, heads: int, tiles: int, dim: int, bits: int, axis: str, tile: int, dtype: torch.dtype, device: str,
    spread: float = 1.0, on_nonfinite: str = "raise",
) -> tuple[AppendRule, FixedBuffers]:  # fmt: skip
    """Rows about to be full; whatever is not in use is NaN."""
    key_codes = UniformQuantizer(dim, bits, axis, tile=tile)  # type: ignore[arg-type]
    value_codes = UniformQuantizer(dim, bits, tile=tile, layout="channel")
    rule = AppendRule(Tier("int", "rest", key_codes, value_codes), SINK, SINK + RECENT + tile, on_nonfinite)
    capacity = rule.threshold + 7
    window = []
    lengths = torch.full((rows, heads), rule.threshold, dtype=torch.int32, device=device)
    lengths[1:] -= torch.randint(0, 3, (max(rows - 1, 0), 1), dtype=torch.int32, device=device)
    for _ in range(2):
        channels = 3 * torch.randn(1, heads, 1, dim, device=device)
        held = (torch.randn(rows, heads, capacity, dim, device=device) * spread + channels).to(dtype)
        held[torch.arange(capacity, device=device) >= lengths[..., None]] = torch.nan
        window.append(held)
    used = torch.randint(0, tiles, (rows, 1), dtype=torch.int32, device=device).expand(-1, heads).contiguous()
    fields = [
        {
            name: torch.full((rows, heads, tiles, *shape), -1, dtype=kind, device=device)
            for name, (shape, kind) in q.field_shapes().items()
        }
        for q in (key_codes, value_codes)
    ]
    return rule, FixedBuffers(*window, *fields, lengths, used, torch.zeros(3, dtype=torch.long, device=device))


def copied(held: FixedBuffers) -> FixedBuffers:
    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) else {name: field.clone() for name, field in value.items()}

    return FixedBuffers(*(copy(value) for value in vars(held).values()))


def same(ours: FixedBuffers, theirs: FixedBuffers) -> None:
    """Every bit in use is alike, and what is not in use was not touched where no tile has gone."""
    for name in ("lengths", "used", "counters"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    live = torch.arange(ours.keys.shape[2], device=ours.keys.device) < ours.lengths[..., None]
    assert torch.equal(ours.keys[live], theirs.keys[live])
    assert torch.equal(ours.values[live], theirs.values[live])
    for mine, his in ((ours.key_fields, theirs.key_fields), (ours.value_fields, theirs.value_fields)):
        for name, field in mine.items():
            assert torch.equal(field, his[name]), name


CASES = [
    (4, "channel", 64, 128, torch.bfloat16),
    (4, "token", 64, 64, torch.float16),
    (2, "channel", 128, 128, torch.float16),
    (2, "token", 64, 80, torch.float32),
    (4, "channel", 128, 96, torch.float32),
    (4, "channel", 64, 256, torch.float16),
]


@pytest.mark.parametrize(("bits", "axis", "tile", "dim", "dtype"), CASES)
def test_the_kernel_is_the_oracle(bits: int, axis: str, tile: int, dim: int, dtype: torch.dtype, device: str) -> None:
    seed()
    rule, ours = problem(3, 2, 4, dim, bits, axis, tile, dtype, device)
    theirs, kernel = copied(ours), TritonAppend()
    for _ in range(5):
        new = (
            torch.randn(2, 3, 1, 2, dim, device=device).to(dtype).transpose(2, 3)
        )  # as a model has it: [B, T, H, D] inside
        assert kernel.accepts(*new, ours, rule)
        kernel(*new, ours, rule)
        append(*new, theirs, rule, look=False)
        same(ours, theirs)
    assert bool((ours.lengths < rule.threshold).all())


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e5])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_flat_tiny_and_huge_tokens(spread: float, axis: str, device: str) -> None:
    """Scales of zero, subnormal ones, and those that end at fp16's largest."""
    seed()
    rule, ours = problem(1, 2, 2, 64, 4, axis, 64, torch.float32, device, spread)
    ours.keys[:, 0] = 0.25
    theirs = copied(ours)
    new = torch.randn(2, 1, 2, 1, 64, device=device)
    TritonAppend()(*new, ours, rule)
    append(*new, theirs, rule, look=False)
    same(ours, theirs)


@pytest.mark.parametrize("on_nonfinite", ["raise", "zero"])
def test_what_is_not_finite_is_counted_or_zero(on_nonfinite: str, device: str) -> None:
    seed()
    rule, ours = problem(2, 2, 2, 64, 4, "token", 64, torch.float16, device, on_nonfinite=on_nonfinite)
    ours.lengths.fill_(9)
    theirs = copied(ours)
    new = torch.randn(2, 2, 2, 1, 64, device=device).half()
    new[0, 1, 0, 0, 3], new[1, 0, 1, 0, 63] = torch.inf, torch.nan
    TritonAppend()(*new, ours, rule)
    append(*new, theirs, rule, look=False)
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
    theirs = copied(ours)
    new = torch.randn(2, 2, 2, 1, dim, device=device).half()
    assert TritonAppend().accepts(*new, ours, rule)
    TritonAppend()(*new, ours, rule)
    append(*new, theirs, rule, look=False)
    assert torch.equal(ours.lengths, theirs.lengths)
    for side, mine, his in zip(
        sides, (ours.key_fields, ours.value_fields), (theirs.key_fields, theirs.value_fields), strict=True
    ):
        at = (torch.arange(2)[:, None], torch.arange(2), ours.used.cpu() - 1)
        codes = [unpack_codes(f[f"codes{bits}"][at].cpu(), bits, side.fmt.layout).int() for f in (mine, his)]
        assert int((codes[0] - codes[1]).abs().max()) <= 1
        assert float((codes[0] != codes[1]).float().mean()) < 0.002
        for found, wanted in zip(*(unpack_meta(f["meta"][at].cpu()) for f in (mine, his)), strict=True):
            assert int((found.view(torch.int16).int() - wanted.view(torch.int16).int()).abs().max()) <= 1


def test_a_full_store_lets_the_window_fill_up_and_writes_nowhere_else(device: str) -> None:
    seed()
    rule, ours = problem(1, 2, 2, 64, 4, "channel", 64, torch.float16, device)
    ours.used.fill_(2)
    theirs = copied(ours)
    for _ in range(12):
        new = torch.randn(2, 1, 2, 1, 64, device=device).half()
        TritonAppend()(*new, ours, rule)
        append(*new, theirs, rule, look=False)
    assert torch.equal(ours.keys, theirs.keys)
    for name, field in ours.key_fields.items():
        assert torch.equal(field, theirs.key_fields[name])
    assert bool((ours.lengths == rule.threshold + 12).all())


def test_what_it_does_not_take_is_refused_with_the_reason(device: str) -> None:
    kernel = TritonAppend()
    rule, held = problem(1, 2, 2, 64, 4, "channel", 64, torch.float16, device)
    new = torch.randn(1, 2, 1, 64, device=device).half()
    assert kernel.supports(rule.tier.keys.format, 64, torch.device(device), torch.float16)
    assert "head_dim 48" in kernel.supports(None, 48, torch.device(device), torch.float16).reason
    three = UniformQuantizer(64, 3, "channel")
    assert "3-bit" in kernel.supports(three.format, 64, torch.device(device), torch.float16).reason
    two = torch.cat([new, new], 2)
    assert "2 tokens" in kernel.accepts(two, two, held, rule).reason
    with pytest.raises(InputError, match="2 tokens"):
        kernel(two, two, held, rule)

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

names = append_kernel.arg_names
pointers = {"KEY_CODES": "*i16", "VALUE_CODES": "*i16", "COUNTERS": "*i64", "LENGTHS": "*i32", "USED": "*i32",
            "KEY_META": "*i32", "VALUE_META": "*i32", "KEY_ROTATION": "constexpr", "VALUE_ROTATION": "constexpr"}
window = ("KEYS", "VALUES", "W_KEYS", "W_VALUES")
kinds = {n: "*bf16" if n in window else pointers.get(n, "constexpr" if n.isupper() else "i32") for n in names}
constants = dict(KEY_ROTATION=None, VALUE_ROTATION=None, KEY_BITS=4, VALUE_BITS=4, KEY_CHANNEL=True, KEY_OUTWARD=True,
                 VALUE_OUTWARD=True, TILE=64, BLOCK=16, ZERO=False, D=128, DP=128)
source = ASTSource(append_kernel, kinds, {(names.index(n),): v for n, v in constants.items()})
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
    assert int(done.stdout) > 1000
