"""Tokens to planes of 2 bits: prompts (``encode``) and tiles that leave the window (``append``), by the kernels and by torch.

Products are summed in another order, so that a code may be one step apart where a number lies on an edge; most never are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import relative_error, seed
from test_append import RECENT, SINK, copied
from test_planes import quantizer
from torch import Tensor

from fade_core import AppendRule, FixedBuffers, append
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import InputError
from fade_core.interfaces import Tier
from fade_core.packed import Packed
from fade_kernels_triton.append import TritonAppend
from fade_kernels_triton.encode import TritonEncode

CASES = [  # heads, D, tile, bits, tokens, dtype
    (2, 64, 64, 2.25, 130, torch.float16),
    (1, 128, 128, 2.0, 128, torch.bfloat16),
    (3, 64, 64, 1.6, 1, torch.float32),  # the end of the stream is empty
    (1, 96, 128, 3.0, 140, torch.float16),
    (2, 80, 64, 1.9, 65, torch.bfloat16),
    (1, 256, 64, 1.7, 64, torch.float16),
]


def tokens_of(q: Any, rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """Tokens such as the quantizer was made for: about its mean, most of them along its first directions."""
    state = q._state
    y = torch.randn(rows, q.heads, length, q.layout.kept, device=state["mean"].device) * state["deviation"][:, None]
    sizes = torch.exp(torch.randn(rows, q.heads, length, 1, device=y.device))
    return (y * sizes @ state["inverse"].float() + state["mean"][:, None]).to(dtype)


def alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, field in theirs.items():
        assert ours[name].dtype == field.dtype and ours[name].shape == field.shape
        assert float((ours[name] == field).float().mean()) > 0.99, name


@pytest.mark.parametrize("side", ["key", "value"])
@pytest.mark.parametrize(("heads", "dim", "tile", "bits", "length", "dtype"), CASES)
def test_prompts_become_the_planes_of_the_quantizer(
    heads: int, dim: int, tile: int, bits: float, length: int, dtype: torch.dtype, side: str, device: str
) -> None:
    """Tokens as a model has them, inside a larger buffer of NaN."""
    seed()
    q = quantizer(heads, dim, side, bits, tile, device=device)
    inside = torch.full((2, length + 9, heads, dim + 16), torch.nan, device=device, dtype=dtype)
    tokens = inside[:, 4 : 4 + length, :, 16:].transpose(1, 2)
    tokens.copy_(tokens_of(q, 2, length, dtype))
    kernel = TritonEncode()
    assert kernel.supports(None, dim, torch.device(device), dtype) and kernel.accepts(q, tokens)
    found, wanted = kernel(q, tokens), q.encode(tokens)
    assert (found.length, found.dtype) == (wanted.length, wanted.dtype)
    alike(found.fields, wanted.fields)
    ours, theirs = (q.decode(Packed(p.fields, p.length, torch.float32)) for p in (found, wanted))
    assert relative_error(ours, theirs.double()) < 0.02
    assert relative_error(ours, tokens.double()) < 1.01 * relative_error(theirs, tokens.double())


@pytest.mark.parametrize("widths", [(0, 2, 6, 8), (0, 2)])
def test_other_even_widths(widths: tuple[int, ...], device: str) -> None:
    seed()
    q = quantizer(2, 64, "key", 1.9, widths=widths, device=device)
    tokens = tokens_of(q, 1, 64, torch.float16)
    alike(TritonEncode()(q, tokens).fields, q.encode(tokens).fields)


def test_tiny_and_huge_tokens_meet_the_ends_of_the_gains(device: str) -> None:
    """Signs of tokens that are next to the mean are those of rounding errors: their codes say nothing."""
    seed()
    q = quantizer(2, 64, "value", 2.1, device=device)
    mean = q._state["mean"][:, None]
    tokens = tokens_of(q, 3, 64, torch.float32)
    tokens = torch.stack([mean + (tokens[0] - mean) * 1e-6, mean + (tokens[1] - mean) * 1e4, mean.expand_as(tokens[2])])
    found, wanted = TritonEncode()(q, tokens), q.encode(tokens)
    assert torch.equal(found.fields["gain"], wanted.fields["gain"])
    assert [set((found.fields["gain"][row] & 15).flatten().tolist()) for row in range(3)] == [{0}, {15}, {0}]
    ours, theirs = (q.decode(p) - mean for p in (found, wanted))
    assert relative_error(ours[1], theirs[1].double()) < 0.02
    for row in (0, 2):
        assert float(ours[row].norm() / theirs[row].norm()) == pytest.approx(1, rel=0.2)


def problem(heads: int, dim: int, tile: int, dtype: torch.dtype, device: str) -> tuple[AppendRule, FixedBuffers]:
    """Three rows, the first about to be full, the second without room for a tile; what is not in use is NaN."""
    keys, values = (quantizer(heads, dim, side, 2.25, tile, device=device) for side in ("key", "value"))
    rule = AppendRule(Tier("planes", "rest", keys, values), SINK, SINK + RECENT + tile)
    lengths = torch.tensor([0, 0, 2], dtype=torch.int32, device=device)
    lengths = (rule.threshold - lengths)[:, None].expand(-1, heads).contiguous()
    window = []
    for q in (keys, values):
        held = tokens_of(q, 3, rule.threshold + 7, dtype)
        held[torch.arange(held.shape[2], device=device) >= lengths[..., None]] = torch.nan
        window.append(held)
    used = torch.tensor([1, 3, 0], dtype=torch.int32, device=device)[:, None].expand(-1, heads).contiguous()
    fields = [
        {
            name: torch.full((3, heads, 3, *shape), 1, dtype=kind, device=device)
            for name, (shape, kind) in q.field_shapes().items()
        }
        for q in (keys, values)
    ]
    return rule, FixedBuffers(*window, *fields, lengths, used, torch.zeros(3, dtype=torch.long, device=device))


@pytest.mark.parametrize(
    ("heads", "dim", "tile", "dtype"),
    [(2, 64, 64, torch.float16), (1, 128, 128, torch.bfloat16), (4, 80, 64, torch.float32)],
)
def test_tiles_that_leave_the_window(heads: int, dim: int, tile: int, dtype: torch.dtype, device: str) -> None:
    seed()
    rule, ours = problem(heads, dim, tile, dtype, device)
    theirs, kernel = copied(ours), TritonAppend()
    for _ in range(4):
        new = torch.randn(2, 3, 1, heads, dim, device=device).to(dtype).transpose(2, 3)  # [B, T, H, D] inside
        assert kernel.accepts(*new, ours, rule)
        kernel(*new, ours, rule)
        append(*new, theirs, rule, look=False)
    for name in ("lengths", "used", "counters"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert ours.used[:, 0].tolist() == [2, 3, 1]
    live = torch.arange(ours.keys.shape[2], device=device) < ours.lengths[..., None]
    assert torch.equal(ours.keys[live], theirs.keys[live]) and torch.equal(ours.values[live], theirs.values[live])
    alike(dict(ours.key_fields), dict(theirs.key_fields))
    alike(dict(ours.value_fields), dict(theirs.value_fields))
    for fields in (ours.key_fields, ours.value_fields):
        assert bool((fields["codes"][0, :, 0] == 1).all()) and bool(
            (fields["codes"][1] == 1).all()
        )  # not in their turn


def test_what_it_cannot_encode_is_refused(device: str) -> None:
    seed()
    rule, held = problem(2, 64, 64, torch.float16, device)
    new = [torch.zeros(3, 2, 1, 64, dtype=torch.float16, device=device) for _ in range(2)]
    gaussian = quantizer(2, 64, "value", 2.25, levels="gaussian", device=device)
    other = AppendRule(Tier("t", "rest", rule.tier.keys, gaussian), SINK, rule.threshold)
    with pytest.raises(InputError, match="'calibrated' has a way of its own"):
        TritonAppend()(*new, held, other)
    mixed = AppendRule(Tier("t", "rest", rule.tier.keys, UniformQuantizer(64, 4)), SINK, rule.threshold)
    assert not TritonAppend().accepts(*new, held, mixed)
    with pytest.raises(InputError, match=r"way of its own|no packed format"):
        TritonEncode()(gaussian, new[0])
    assert "tokens (3, 1, 1, 64)" in TritonEncode().accepts(rule.tier.keys, new[0][:, :1]).reason
