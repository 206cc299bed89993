"""The encode kernel writes what the quantizer writes, bit by bit; caches come out the same with it."""

from __future__ import annotations

import pytest
import torch
from oracle import seed
from test_append import Turned
from test_kernel_cache import model

from fade_core import FadeConfig, create_tiered_cache
from fade_core.builtin.quantizers.kivi import KiviQuantizer
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import InputError
from fade_core.packed import Tiles, unpack_codes, unpack_meta
from fade_core.testing import check_kernel
from fade_kernels_triton.encode import TritonEncode

CASES = [
    (4, "channel", 64, 128, torch.bfloat16, 130, 0),
    (4, "token", 64, 64, torch.float16, 64, 16),
    (2, "channel", 128, 128, torch.float16, 200, 0),
    (2, "token", 64, 80, torch.float32, 1, 0),
    (3, "channel", 128, 96, torch.float32, 129, 0),
    (2, "token", 64, 256, torch.bfloat16, 65, 64),
    (3, "token", 64, 128, torch.float16, 70, 32),
]


@pytest.mark.parametrize("layout", ["token", "channel"])
@pytest.mark.parametrize(("bits", "axis", "tile", "dim", "dtype", "length", "group"), CASES)
def test_the_kernel_is_the_quantizer(
    bits: int, axis: str, tile: int, dim: int, dtype: torch.dtype, length: int, group: int, layout: str, device: str
) -> None:
    """Tokens as a model has them, inside a larger buffer of NaN."""
    seed()
    quantizer = UniformQuantizer(dim, bits, axis, group=group, tile=tile, layout=layout)  # type: ignore[arg-type]
    inside = torch.full((2, length + 9, 3, dim + 16), torch.nan, device=device, dtype=dtype)
    tokens = inside[:, 4 : 4 + length, :, 16:].transpose(1, 2)
    tokens.copy_(torch.randn(2, 3, length, dim, device=device) + 3 * torch.randn(1, 3, 1, dim, device=device))
    kernel = TritonEncode()
    assert kernel.supports(quantizer.format, dim, torch.device(device), dtype)
    assert kernel.accepts(quantizer, tokens)
    found, wanted = kernel(quantizer, tokens), quantizer.encode(tokens)
    assert (found.length, found.dtype) == (wanted.length, wanted.dtype)
    for name, field in wanted.fields.items():
        assert torch.equal(found.fields[name], field.to(found.fields[name].dtype)), name


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize(("bits", "axis", "tile", "dim", "dtype", "length", "group"), CASES[::2])
def test_tiles_go_where_the_table_says(
    bits: int,
    axis: str,
    tile: int,
    dim: int,
    dtype: torch.dtype,
    length: int,
    group: int,
    kind: torch.dtype,
    device: str,
) -> None:
    """Anywhere in a pool of NaN; what has no place is not written, nor is anything else."""
    seed()
    quantizer = UniformQuantizer(dim, bits, axis, group=group, tile=tile)  # type: ignore[arg-type]
    tokens = torch.randn(2, 3, length, dim, device=device).to(dtype)
    wanted = quantizer.encode(tokens).fields
    tiles = -(-length // tile)
    ids = torch.randperm(6 * tiles + 4, device=device)[: 6 * tiles].view(2, 3, tiles).to(kind)
    ids[1, 1:] = -1
    fields = {
        name: torch.full((6 * tiles + 4, *shape), -1, dtype=field, device=device)
        for name, (shape, field) in quantizer.field_shapes().items()
    }
    kernel, live = TritonEncode(), ids >= 0
    assert kernel.accepts(quantizer, tokens, Tiles(fields, ids))
    assert kernel(quantizer, tokens, Tiles(fields, ids)) is None
    untouched = torch.ones(6 * tiles + 4, dtype=torch.bool, device=device)
    untouched[ids[live].long()] = False
    for name, field in fields.items():
        assert torch.equal(field[ids[live].long()], wanted[name][live].to(field.dtype)), name
        assert bool((field[untouched] == -1).all())


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e5])
@pytest.mark.parametrize("axis", ["channel", "token"])
def test_flat_tiny_and_huge_tokens(spread: float, axis: str, device: str) -> None:
    seed()
    quantizer = UniformQuantizer(64, 4, axis)  # type: ignore[arg-type]
    tokens = torch.randn(1, 2, 70, 64, device=device) * spread + torch.randn(1, 2, 1, 64, device=device)
    found, wanted = TritonEncode()(quantizer, tokens), quantizer.encode(tokens)
    assert all(torch.equal(found.fields[name], field) for name, field in wanted.fields.items())


@pytest.mark.parametrize(("bits", "tile", "dim"), [(4, 64, 64), (4, 128, 80), (2, 128, 128)])
def test_tokens_are_turned_before_they_are_encoded(bits: int, tile: int, dim: int, device: str) -> None:
    """Sums in another order: a code or a scale may be one step off, rarely."""
    seed()
    quantizer = Turned(dim, bits, tile=tile)
    quantizer.turn = quantizer.turn.to(device)
    tokens = torch.randn(2, 2, 2 * tile, dim, device=device).half()
    found, wanted = TritonEncode()(quantizer, tokens), quantizer.encode(tokens)
    codes = [unpack_codes(p.fields[f"codes{bits}"].cpu(), bits, quantizer.fmt.layout).int() for p in (found, wanted)]
    assert int((codes[0] - codes[1]).abs().max()) <= 1
    assert float((codes[0] != codes[1]).float().mean()) < 0.002
    for ours, theirs in zip(*(unpack_meta(p.fields["meta"].cpu()) for p in (found, wanted)), strict=True):
        assert int((ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs().max()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("fixed", [False, True])
def test_a_prompt_is_packed_by_it(fixed: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing and fixed caches hold the same codes as without it."""
    number, calls = seed(), []
    llama = model(device)
    ids = torch.randint(1, 64, (2, 230), generator=torch.Generator().manual_seed(number)).to(device)
    run = TritonEncode.__call__
    monkeypatch.setattr(TritonEncode, "__call__", lambda self, *args: calls.append(1) or run(self, *args))
    held = []
    for kind in ("torch", "triton"):
        config = FadeConfig(n_sink=4, recent_window=16, kernel={"encode": kind, "decode_attention": "torch"})
        with torch.no_grad(), create_tiered_cache(llama, config, max_cache_len=300 if fixed else None) as cache:
            llama(ids, past_key_values=cache, use_cache=True)
            held.append([p.fields for layer in cache.tiered for p in layer.held.stores[0].view().packed()])
        assert bool(calls) == (kind == "triton")
    for theirs, ours in zip(*held, strict=True):
        assert all(torch.equal(ours[name], field) for name, field in theirs.items())


@pytest.mark.slow
def test_conformance(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    results = check_kernel(TritonEncode(), device=device, dtype=dtype)
    assert all(result.passed for result in results), results
    assert {r.name for r in results if r.outcome == "passed"} >= {"support", "encoding"}


def test_what_it_does_not_take_is_refused_with_the_reason(device: str) -> None:
    kernel, tokens = TritonEncode(), torch.randn(1, 2, 70, 64, device=device)
    assert "8-bit" in kernel.supports(UniformQuantizer(64, 8).format, 64, torch.device(device), torch.float32).reason
    grouped = UniformQuantizer(64, 4, "token", group=8)
    assert "8 groups" in kernel.accepts(grouped, tokens).reason
    with pytest.raises(InputError, match="8 groups"):
        kernel(grouped, tokens)
    assert "float64" in kernel.accepts(UniformQuantizer(64, 4), tokens.double()).reason
    assert kernel.accepts(KiviQuantizer(64, 4, group=64), tokens)
    assert "groups" in kernel.accepts(KiviQuantizer(64, 4, group=32), tokens).reason
    four = UniformQuantizer(64, 4)
    fields = {name: field.flatten(0, 2) for name, field in four.encode(tokens).fields.items()}
    apart = {name: field.repeat(2, *(1,) * (field.dim() - 1))[::2] for name, field in fields.items()}
    ids = torch.zeros(1, 2, 2, dtype=torch.int16, device=device)
    assert "contiguous" in kernel.accepts(four, tokens, Tiles(apart, ids.int())).reason
    assert "int16" in kernel.accepts(four, tokens, Tiles(fields, ids)).reason
    assert "70 tokens for 1 tiles" in kernel.accepts(four, tokens, Tiles(fields, ids[..., :1].int())).reason
