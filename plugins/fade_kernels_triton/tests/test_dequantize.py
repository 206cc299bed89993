"""The dequantize kernel gives back what the quantizer decodes; a chunk over a packed past reads the same."""

from __future__ import annotations

import pytest
import torch
from oracle import seed
from test_encode import CASES
from test_kernel_cache import model

from fade_core import FadeConfig, create_tiered_cache
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import InputError
from fade_core.packed import Packed
from fade_core.testing import check_kernel
from fade_kernels_triton.dequantize import TritonDequantize


@pytest.mark.parametrize("layout", ["token", "channel"])
@pytest.mark.parametrize(("bits", "axis", "tile", "dim", "dtype", "length", "group"), CASES)
def test_the_kernel_is_the_quantizer(
    bits: int, axis: str, tile: int, dim: int, dtype: torch.dtype, length: int, group: int, layout: str, device: str
) -> None:
    """Tiles out of a larger buffer, whose other tiles are NaN; within one rounding of the dtype, and exact in float32."""
    seed()
    quantizer = UniformQuantizer(dim, bits, axis, group=group, tile=tile, layout=layout)  # type: ignore[arg-type]
    packed = quantizer.encode((torch.randn(2, 3, length, dim, device=device) + 2).to(dtype))
    tiles = packed.fields["meta"].shape[2]
    fields = {n: torch.full_like(f, -1).repeat(1, 1, 3, *[1] * (f.dim() - 3)) for n, f in packed.fields.items()}
    for name, field in packed.fields.items():
        fields[name][:, :, tiles : 2 * tiles] = field
    part = Packed({n: f[:, :, tiles : 2 * tiles] for n, f in fields.items()}, length, dtype)
    kernel = TritonDequantize()
    assert kernel.supports(quantizer.format, dim, torch.device(device), dtype)
    assert kernel.accepts(quantizer, part)
    found, wanted = kernel(quantizer, part), quantizer.decode(packed)
    assert found.shape == (2, 3, length, dim)
    torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=0 if device == "cpu" else 1e-6)


@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
@pytest.mark.parametrize(("bits", "axis", "tile", "dim", "dtype", "length", "group"), CASES[::2])
def test_tiles_come_from_where_the_table_says(
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
    """Out of a pool whose other tiles are NaN; zeros where there is none."""
    seed()
    quantizer = UniformQuantizer(dim, bits, axis, group=group, tile=tile)  # type: ignore[arg-type]
    packed = quantizer.encode((torch.randn(2, 3, length, dim, device=device) + 2).to(dtype))
    tiles = packed.fields["meta"].shape[2]
    ids = torch.randperm(6 * tiles + 4, device=device)[: 6 * tiles].view(2, 3, tiles)
    pool = {
        n: torch.full((6 * tiles + 4, *f.shape[3:]), -1, dtype=f.dtype, device=device) for n, f in packed.fields.items()
    }
    for name, field in packed.fields.items():
        pool[name][ids] = field
    ids[1, 1:] = -1
    kernel, part = TritonDequantize(), Packed(pool, length, dtype)
    assert kernel.accepts(quantizer, part, ids.to(kind))
    found, wanted = kernel(quantizer, part, ids.to(kind)), quantizer.decode(packed)
    wanted[1, 1:] = 0
    torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=0 if device == "cpu" else 1e-6)


def test_conformance(device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    results = check_kernel(TritonDequantize(), device=device, dtype=dtype)
    assert all(result.passed for result in results), results
    assert {r.name for r in results if r.outcome == "passed"} >= {"support", "decoding"}


@pytest.mark.parametrize("fixed", [False, True])
def test_a_chunk_reads_the_past_by_it(fixed: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number, calls = seed(), []
    llama = model(device).float()  # Triton's interpreter cuts bfloat16 off where a GPU rounds
    ids = torch.randint(1, 64, (2, 250), generator=torch.Generator().manual_seed(number)).to(device)
    run = TritonDequantize.__call__
    monkeypatch.setattr(TritonDequantize, "__call__", lambda self, *args: calls.append(1) or run(self, *args))
    found = []
    for kind in ("torch", "triton"):
        config = FadeConfig(n_sink=4, recent_window=16, kernel={"dequantize": kind, "decode_attention": "torch"})
        with torch.no_grad(), create_tiered_cache(llama, config, max_cache_len=300 if fixed else None) as cache:
            for chunk in ids.split(125, 1):
                out = llama(chunk, past_key_values=cache, use_cache=True).logits
            found.append(out.float())
        assert bool(calls) == (kind == "triton")
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5 * float(found[0].std()))


def test_what_it_does_not_take_is_refused_with_the_reason(device: str) -> None:
    kernel = TritonDequantize()
    eight = UniformQuantizer(64, 8)
    assert "8-bit" in kernel.supports(eight.format, 64, torch.device(device), torch.float32).reason
    four = UniformQuantizer(64, 4)
    packed = four.encode(torch.randn(1, 2, 70, 64, device=device))
    with pytest.raises(InputError, match="float64"):
        kernel(four, Packed(packed.fields, 70, torch.float64))
    apart = {n: f.transpose(-1, -2).contiguous().transpose(-1, -2) for n, f in packed.fields.items()}
    assert "follow one another" in kernel.accepts(four, Packed(apart, 70, torch.float32)).reason

    class Own(UniformQuantizer):
        kind = "own"

        def decode(self, packed: Packed) -> torch.Tensor:
            return super().decode(packed)

    assert "'own' has a way of its own" in kernel.accepts(Own(64, 4), packed).reason
