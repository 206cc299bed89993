"""The packed format: words against its written definition, bit by bit, and there and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fresh_seed

from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import ConfigError
from fade_core.packed import (
    WORD_BITS,
    Layout,
    Packed,
    PackedFormat,
    pack_codes,
    pack_meta,
    planes_of,
    unpack_codes,
    unpack_meta,
)
from fade_core.storage.codec import Codec

LAYOUTS = st.sampled_from(["token", "channel"])
PACKABLE = (1, 2, 3, 4, 5, 6, 8)


@settings(max_examples=60, deadline=None)
@given(
    width=st.sampled_from([1, 2, 4, 8]),
    layout=LAYOUTS,
    tile=st.integers(1, 8).map(lambda n: 16 * n),
    dim=st.integers(1, 20),
    lead=st.lists(st.integers(1, 3), max_size=3),
    seed=st.integers(0, 2**31),
)
def test_codes_survive_packing(width: int, layout: Layout, tile: int, dim: int, lead: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    codes = torch.randint(0, 2**width, (*lead, tile, dim), dtype=torch.int16)
    words = pack_codes(codes, width, layout)
    rows = tile * width // WORD_BITS
    assert words.dtype == torch.int16
    assert words.shape == ((*lead, rows, dim) if layout == "token" else (*lead, dim, rows))
    assert words.is_contiguous()
    for dtype in (torch.int16, torch.float32):
        found = unpack_codes(words, width, layout, dtype)
        assert found.dtype == dtype
        assert torch.equal(found if layout == "token" else found.transpose(-1, -2), codes.to(dtype))


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_field_j_of_word_row_r_holds_token_j_times_rows_plus_r(width: int) -> None:
    tile, dim = 48, 3
    rows = tile * width // WORD_BITS
    codes = torch.randint(0, 2**width, (tile, dim))
    words = pack_codes(codes, width, "token")
    channels_first = pack_codes(codes, width, "channel")
    for field in range(WORD_BITS // width):
        for row in range(rows):
            for channel in range(dim):
                expected = int(codes[field * rows + row, channel])
                for word in (int(words[row, channel]), int(channels_first[channel, row])):
                    assert ((word & 0xFFFF) >> (width * field)) & (2**width - 1) == expected


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(PACKABLE),
    layout=LAYOUTS,
    axis=st.sampled_from(["token", "channel"]),
    tile=st.sampled_from([16, 64, 96]),
    dim=st.sampled_from([8, 24, 64]),
    whole=st.booleans(),
)
def test_field_shapes_take_the_bits_that_the_format_promises(
    bits: int, layout: Layout, axis: Layout, tile: int, dim: int, whole: bool
) -> None:
    fmt = PackedFormat(bits, dim, tile, axis, 0 if whole else 8, layout)
    held = sum(torch.empty(shape, dtype=dtype).nbytes for shape, dtype in fmt.field_shapes().values())
    assert held * 8 == pytest.approx(fmt.bits_per_element * tile * dim)
    assert fmt.groups * fmt.group == (dim if axis == "token" else tile)
    assert sum(planes_of(bits)) == bits
    assert all(WORD_BITS % width == 0 for width in planes_of(bits))


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**31), shape=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_metadata_keeps_every_half_precision_bit_pattern(seed: int, shape: list[int]) -> None:
    torch.manual_seed(seed)
    scale, minimum = torch.randint(-(2**15), 2**15, (2, *shape), dtype=torch.int16).view(torch.float16)
    words = pack_meta(scale, minimum)
    assert words.dtype == torch.int32
    assert words.shape == tuple(shape)
    found = unpack_meta(words)
    for got, given_ in zip(found, (scale, minimum), strict=True):
        same = got.view(torch.int16) == given_.view(torch.int16)
        assert bool((same | (got.isnan() & given_.isnan())).all())
    low = words & 0xFFFF
    finite = ~scale.isnan()
    assert torch.equal(low[finite], (scale.view(torch.int16).int() & 0xFFFF)[finite])


def test_metadata_is_read_through_a_view_with_strides() -> None:
    words = pack_meta(torch.randn(4, 6).half(), torch.randn(4, 6).half())
    scale, minimum = unpack_meta(words.transpose(0, 1))
    assert torch.equal(scale, unpack_meta(words)[0].transpose(0, 1))
    assert torch.equal(minimum, unpack_meta(words)[1].transpose(0, 1))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 7}, r"bits=7 cannot be packed; choose one of \[1, 2, 3, 4, 5, 6, 8\]"),
        ({"bits": 0}, "bits=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"head_dim": -8}, "head_dim=-8"),
        ({"tile": 24}, "tile=24 must be a positive multiple of 16"),
        ({"tile": -16}, "tile=-16"),
        ({"axis": "row"}, "axis='row'"),
        ({"layout": "row"}, "layout='row'"),
        ({"group": 7}, "group=7 must divide 32"),
        ({"group": -1}, "group=-1"),
        ({"axis": "channel", "group": 48}, "group=48 must divide 64"),
        ({"levels": (0.0, 1.0)}, "2 levels given for 4-bit codes; 16 are needed"),
    ],
)
def test_a_format_that_cannot_work_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PackedFormat(**({"bits": 4, "head_dim": 32} | fields))  # type: ignore[arg-type]


def test_packed_counts_all_its_fields() -> None:
    packed = Packed({"a": torch.zeros(3, dtype=torch.int16), "b": torch.zeros(5)}, 3, torch.float32)
    assert packed.nbytes == 3 * 2 + 5 * 4


@pytest.mark.parametrize("all_placed", [True, False])
def test_tiles_go_into_a_pool_and_come_back(all_placed: bool) -> None:
    """Places in any order; tiles without one are not written, and are zeros when they are read."""
    torch.manual_seed(fresh_seed())
    quantizer = UniformQuantizer(12, 4, "channel", tile=16)
    tokens = torch.randn(2, 3, 40, 12)
    wanted = torch.nn.functional.pad(quantizer.decode(quantizer.encode(tokens)), (0, 0, 0, 8))
    pool = {
        name: torch.full((25, *shape), -1, dtype=dtype) for name, (shape, dtype) in quantizer.field_shapes().items()
    }
    ids = torch.randperm(25)[:18].int().view(2, 3, 3)
    if not all_placed:
        ids[0, 1:, 2] = -1
        ids[1] = -1
    Codec().encode_into(quantizer, tokens, pool, ids)
    found = Codec().decode_from(quantizer, pool, ids, torch.float32)
    assert found.shape == (2, 3, 48, 12)
    there = (ids >= 0).repeat_interleave(16, 2)  # [B, H_kv, T]
    there[..., 40:] = False
    assert torch.equal(found[there], wanted[there])
    assert not found[(ids < 0).repeat_interleave(16, 2)].any()
    untouched = torch.ones(25, dtype=torch.bool)
    untouched[ids[ids >= 0].long()] = False
    assert all(bool((field[untouched] == -1).all()) for field in pool.values())
    before = {name: field.clone() for name, field in pool.items()}
    Codec().encode_into(quantizer, tokens, pool, torch.full_like(ids, -1))
    assert all(torch.equal(field, before[name]) for name, field in pool.items())
