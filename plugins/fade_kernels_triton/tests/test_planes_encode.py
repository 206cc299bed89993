"""Tokens to planes of 2 bits: prompts (``encode``) and tiles that leave the window (``append``), by the kernels and by torch.

Products are summed in another order, so that a code may be one step apart where a number lies on an edge; most never are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import relative_error, seed
from test_append import RECENT, SINK, buffers, same_but_codes
from test_planes import quantizer
from torch import Tensor

from fade_core import AppendRule, StepBuffers, append
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import InputError
from fade_core.interfaces import Tier
from fade_core.packed import Packed, Tiles
from fade_kernels_triton.append import TritonAppend
from fade_kernels_triton.encode import TritonEncode

CASES = [  # heads, D, tile, bits, tokens, dtype
    (2, 64, 64, 2.25, 130, torch.float16),
    (1, 128, 128, 2.0, 128, torch.bfloat16),
    (3, 64, 64, 1.6, 1, torch.float32),  # the end of the stream is empty
    (1, 96, 128, 3.0, 140, torch.float16),
    (2, 80, 64, 1.9, 65, torch.bfloat16),
    (1, 256, 128, 1.7, 140, torch.bfloat16),
]


def tokens_of(q: Any, rows: int, length: int, dtype: torch.dtype) -> Tensor:
    """Tokens such as the quantizer was made for: about its mean, most of them along its first directions."""
    state = q._state
    y = torch.randn(rows, q.heads, length, q.layout.kept, device=state["mean"].device) * state["deviation"][:, None]
    sizes = torch.exp(torch.randn(rows, q.heads, length, 1, device=y.device))
    return (y * sizes @ state["inverse"].float() + state["mean"][:, None]).to(dtype)


def alike(q: Any, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Codes and gains ``[B, H_kv, n, ...]``; what lies in slots that hold nothing is nobody's business."""
    for name, field in theirs.items():
        assert ours[name].dtype == field.dtype and ours[name].shape == field.shape
    codes = [q.layout.unpack(fields["codes"]) for fields in (ours, theirs)]
    for name, (found, wanted) in {"codes": codes, "gain": (ours["gain"], theirs["gain"])}.items():
        assert float((found == wanted).float().mean()) > 0.998, name


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
    alike(q, found.fields, wanted.fields)
    ours, theirs = (q.decode(Packed(p.fields, p.length, torch.float32)) for p in (found, wanted))
    assert relative_error(ours, theirs.double()) < 0.02
    assert relative_error(ours, tokens.double()) < 1.01 * relative_error(theirs, tokens.double())


def test_wide_heads_in_short_tiles_are_refused(device: str) -> None:
    q = quantizer(1, 256, "key", 1.7, 64, device=device)
    tokens = tokens_of(q, 2, 64, torch.float16)
    kernel = TritonEncode()
    assert not kernel.accepts(q, tokens)
    assert "tiles of 64 tokens with 256 channels" in kernel.accepts(q, tokens).reason


def test_prompts_go_into_the_tiles_of_a_pool(device: str) -> None:
    """A head's planes lie in the tiles of its row's heads, wherever those are; what has no place is not written."""
    seed()
    q = quantizer(3, 64, "key", 1.6, device=device)
    tokens = tokens_of(q, 2, 100, torch.float16)
    kernel, wanted = TritonEncode(), q.encode(tokens).fields
    shapes = {name: (shape, kind) for name, (shape, kind) in q.field_shapes().items()}
    fields = {n: torch.full((14, *shape), 1, dtype=kind, device=device) for n, (shape, kind) in shapes.items()}
    ids = torch.randperm(14, device=device)[:12].view(2, 3, 2)
    unplaced = ids[1, :, 1].clone()
    ids[1, :, 1] = -1
    assert kernel.accepts(q, tokens, Tiles(fields, ids))
    assert kernel(q, tokens, Tiles(fields, ids)) is None
    there = (ids >= 0)[..., None]  # [B, H_kv, n, 1]
    found = {name: torch.where(there, field[ids.clamp_min(0)], 0) for name, field in fields.items()}
    alike(q, found, {name: torch.where(there, field, 0) for name, field in wanted.items()})
    for field in fields.values():
        assert bool((field[unplaced] == 1).all())


@pytest.mark.parametrize("widths", [(0, 2, 6, 8), (0, 2)])
def test_other_even_widths(widths: tuple[int, ...], device: str) -> None:
    seed()
    q = quantizer(2, 64, "key", 1.9, widths=widths, device=device)
    tokens = tokens_of(q, 1, 64, torch.float16)
    alike(q, TritonEncode()(q, tokens).fields, q.encode(tokens).fields)


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


def problem(
    heads: int, dim: int, tile: int, dtype: torch.dtype, device: str, runs: bool = True
) -> tuple[AppendRule, StepBuffers]:
    """Three rows, the first about to be full, the second without room for a tile; what is not in use is NaN.

    Without ``runs`` as ``test_append.buffers`` says, heads of a row alike.
    """
    keys, values = (quantizer(heads, dim, side, 2.25, tile, device=device) for side in ("key", "value"))
    rule = AppendRule(Tier("planes", "rest", keys, values), SINK, SINK + RECENT + tile)
    lengths = rule.threshold - torch.tensor([0, 0, 2], dtype=torch.int32, device=device)
    window = [tokens_of(q, 3, rule.threshold + tile + 7, dtype) for q in (keys, values)]
    held = buffers(rule, window, lengths, 3, runs, ragged=False)
    held.used.copy_(torch.tensor([1, 3, 0])[:, None])
    for fields in (held.key_fields, held.value_fields):
        for field in fields.values():
            field.fill_(1)
    return rule, held


@pytest.mark.parametrize(
    ("heads", "dim", "tile", "dtype", "runs"),
    [
        (2, 64, 64, torch.float16, True),
        (1, 128, 128, torch.bfloat16, True),
        (4, 80, 64, torch.float32, True),
        (3, 64, 64, torch.float16, False),
    ],
)
def test_tiles_that_leave_the_window(
    heads: int, dim: int, tile: int, dtype: torch.dtype, runs: bool, device: str
) -> None:
    seed()
    rule, ours = problem(heads, dim, tile, dtype, device, runs)
    theirs, kernel = ours.clone(), TritonAppend()
    for count in (1, 1, 1) if runs else (1, 2, 3):
        new = torch.randn(2, 3, count, heads, dim, device=device).to(dtype).transpose(2, 3)  # [B, T, H, D] inside
        assert kernel.accepts(*new, ours, rule)
        kernel(*new, ours, rule)
        append(*new, theirs, rule, on_host=False)
    same_but_codes(ours, theirs)
    assert ours.used[:, 0].tolist() == [2 if runs else 3, 3, 1]
    sides = (
        (rule.tier.keys, ours.key_fields, theirs.key_fields),
        (rule.tier.values, ours.value_fields, theirs.value_fields),
    )
    for q, found, wanted in sides:
        places = ours.ids.long()  # [B, H_kv, tiles]
        mine, his = ({name: field[places] for name, field in f.items()} for f in (found, wanted))
        alike(q, mine, his)
        assert bool((mine["codes"][0, :, 0] == 1).all()) and bool((mine["codes"][1] == 1).all())  # not in their turn
        spare = torch.ones(len(found["codes"]), dtype=torch.bool, device=device)
        spare[places.flatten()] = False
        assert bool((found["codes"][spare] == 1).all()) and bool((found["gain"][spare] == 1).all())


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
