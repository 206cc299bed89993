"""The uniform quantizer: errors within half a step, whatever the values; attention in packed space; codes that move."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import fresh_seed
from torch import Tensor

from fade_core.builtin.quantizers.full import FullQuantizer
from fade_core.builtin.quantizers.uniform import BITS, UniformConfig, UniformQuantizer
from fade_core.errors import ConfigError, InputError
from fade_core.interfaces import QuantizerContext
from fade_core.packed import Packed, unpack_meta

PACKED_BITS = [bits for bits in BITS if bits < 16]
AXES = ["token", "channel"]
FP32 = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(fresh_seed())


def steps(quantizer: UniformQuantizer, packed: Packed) -> Tensor:
    """Scale of every element, ``[B, H, T, D]``."""
    scale = unpack_meta(packed.fields["meta"])[0].float()
    group = quantizer.fmt.group
    if quantizer.fmt.axis == "token":
        spread = scale.transpose(-1, -2).repeat_interleave(group, -1)  # [B, H, n, tile, D]
    else:
        spread = scale.repeat_interleave(group, -2)
    return spread.flatten(2, 3)[:, :, : packed.length]


def values(kind: str, shape: tuple[int, ...]) -> Tensor:
    """Tokens of a shape that keys and values of real models take."""
    x = torch.randn(shape)
    if kind == "offset":  # channels with a huge bias, as Qwen2.5's first layer has
        return x * 0.05 + torch.linspace(-500, 500, shape[-1])
    if kind == "tiny":
        return x * 1e-6
    if kind == "subnormal":
        return x * 1e-9
    if kind == "constant":
        return (x[..., :1, :1] * 300).expand(shape).contiguous()
    if kind == "outlier":
        x[..., shape[-1] // 2] *= 200
        return x
    if kind == "huge":
        return x * 1e4
    return x


@pytest.mark.parametrize("kind", ["normal", "offset", "tiny", "subnormal", "constant", "outlier", "huge"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_every_element_is_within_half_a_step(bits: int, axis: str, kind: str) -> None:
    quantizer = UniformQuantizer(32, bits, axis, 16, tile=32, layout="token")  # type: ignore[arg-type]
    x = values(kind, (2, 3, 77, 32))
    packed = quantizer.encode(x)
    error = (quantizer.decode(packed) - x).abs()
    # half a step, the share of the scale that its own rounding may miss, and float32's rounding of code * scale + minimum
    bound = steps(quantizer, packed) * (0.5 + 2**bits * 2.0**-19) + 4 * FP32 * x.abs()
    assert bool((error <= bound).all()), float((error - bound).max())
    spread = x.unflatten(-1, (-1, 16)).amax(-1) - x.unflatten(-1, (-1, 16)).amin(-1) if axis == "token" else None
    if (
        kind == "normal" and spread is not None
    ):  # and the step itself is what the spread asks for, fp16's rounding apart
        step = steps(quantizer, packed)[..., ::16]
        assert torch.allclose(step, spread / (2**bits - 1), rtol=2.0**-7)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(PACKED_BITS),
    axis=st.sampled_from(AXES),
    layout=st.sampled_from(AXES),
    tile=st.sampled_from([16, 64]),
    group=st.sampled_from([0, 8, 16]),
    length=st.integers(1, 150),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    offset=st.floats(-600, 600),
    size=st.floats(1e-3, 50),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_dtype_is_within_half_a_step(
    bits: int,
    axis: str,
    layout: str,
    tile: int,
    group: int,
    length: int,
    dtype: torch.dtype,
    offset: float,
    size: float,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    quantizer = UniformQuantizer(24 if group != 16 else 48, bits, axis, group, tile, layout)  # type: ignore[arg-type]
    x = (torch.randn(1, 2, length, quantizer.head_dim) * size + offset).to(dtype)
    packed = quantizer.encode(x)
    decoded = quantizer.decode(packed)
    assert decoded.dtype == dtype
    assert decoded.shape == x.shape
    tiles = -(-length // tile)
    shapes = {name: (field.shape, field.dtype) for name, field in packed.fields.items()}
    assert shapes == {n: ((1, 2, tiles, *shape), kind) for n, (shape, kind) in quantizer.field_shapes().items()}
    assert quantizer.nbytes(packed) * 8 == pytest.approx(
        quantizer.bits_per_element * 2 * tiles * tile * quantizer.head_dim
    )
    error = (decoded.float() - x.float()).abs()
    rounding = (torch.finfo(dtype).eps + 4 * FP32) * (x.float().abs() + steps(quantizer, packed))
    assert bool((error <= steps(quantizer, packed) * (0.5 + 2**bits * 2.0**-19) + rounding).all())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_a_constant_group_comes_back_as_fp16_holds_it(bits: int, axis: str) -> None:
    quantizer = UniformQuantizer(16, bits, axis, tile=16)  # type: ignore[arg-type]
    for constant in (0.0, -0.0, 1.5, -272.25, 65504.0, -65504.0):
        x = torch.full((1, 1, 16, 16), constant)
        assert torch.equal(quantizer.decode(quantizer.encode(x)), x)


@pytest.mark.parametrize("axis", AXES)
def test_values_beyond_fp16_are_clamped_and_stay_finite(axis: str) -> None:
    quantizer = UniformQuantizer(16, 4, axis, tile=16)  # type: ignore[arg-type]
    x = torch.randn(1, 2, 20, 16) * 1e30
    assert bool(torch.isfinite(quantizer.decode(quantizer.encode(x))).all())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_encoding_again_changes_no_code(bits: int, axis: str) -> None:
    quantizer = UniformQuantizer(32, bits, axis, 16, tile=32, layout="channel")  # type: ignore[arg-type]
    once = quantizer.encode(torch.randn(2, 2, 96, 32))
    again = quantizer.encode(quantizer.decode(once))
    for name, field in once.fields.items():
        assert torch.equal(field, again.fields[name]), name


@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("group", [0, 8])
@pytest.mark.parametrize("bits", PACKED_BITS)
def test_scores_and_combine_are_those_of_the_decoded_tokens(bits: int, axis: str, layout: str, group: int) -> None:
    quantizer = UniformQuantizer(24, bits, axis, group, tile=16, layout=layout)  # type: ignore[arg-type]
    packed = quantizer.encode(torch.randn(2, 3, 41, 24) * 3 + 7)
    query, weights = torch.randn(2, 3, 5, 24), torch.rand(2, 3, 5, 41)
    tokens = quantizer.decode(packed).double()
    scores = quantizer.scores(query, packed)
    combined = quantizer.combine(weights, packed)
    assert scores.dtype == combined.dtype == torch.float32
    # both sum 24 or 41 products of numbers around 10: float32 loses some 1e-5 in either
    torch.testing.assert_close(scores.double(), query.double() @ tokens.transpose(-1, -2), rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(combined.double(), weights.double() @ tokens, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("bits", PACKED_BITS)
@pytest.mark.parametrize("layout", AXES)
@pytest.mark.parametrize("group", [0, 8])
def test_select_moves_tokens_without_touching_their_codes(bits: int, layout: str, group: int) -> None:
    quantizer = UniformQuantizer(24, bits, "token", group, tile=16, layout=layout)  # type: ignore[arg-type]
    assert quantizer.moves_tokens
    packed = quantizer.encode(torch.randn(2, 3, 61, 24))
    index = torch.randint(0, 61, (2, 3, 32))
    chosen = quantizer.select(packed, index)
    assert chosen.length == 32
    expected = quantizer.decode(packed).gather(2, index[..., None].expand(-1, -1, -1, 24))
    assert torch.equal(quantizer.decode(chosen), expected)


def test_a_shared_scale_ties_tokens_to_their_tile() -> None:
    quantizer = UniformQuantizer(16, 4, "channel", tile=16)
    assert not quantizer.moves_tokens
    packed = quantizer.encode(torch.randn(1, 1, 32, 16))
    with pytest.raises(InputError, match="moves whole tiles"):
        quantizer.select(packed, torch.zeros(1, 1, 16, dtype=torch.long))
    with pytest.raises(InputError, match="multiple of the tile"):
        UniformQuantizer(16, 4, tile=16).select(packed, torch.zeros(1, 1, 5, dtype=torch.long))


@pytest.mark.parametrize(
    "tokens",
    [
        torch.randn(1, 2, 3),
        torch.randn(1, 2, 3, 8),
        torch.randn(1, 2, 0, 16),
        torch.randint(0, 5, (1, 2, 3, 16)),
        torch.zeros(1, 2, 3, 16, dtype=torch.bool),
    ],
)
def test_tokens_of_a_wrong_shape_or_type_are_refused(tokens: Tensor) -> None:
    with pytest.raises(InputError, match="quantizer 'uniform' takes"):
        UniformQuantizer(16).encode(tokens)


@pytest.mark.parametrize("bits", [-4, 0, 1, 5, 6, 7, 9, 32])
def test_a_width_that_cannot_be_stored_is_refused_with_the_widths_that_can(bits: int) -> None:
    with pytest.raises(ConfigError, match="bits"):
        UniformConfig(bits=bits)


@pytest.mark.parametrize("side", ["key", "value"])
def test_the_configuration_builds_what_it_says(side: str) -> None:
    context = QuantizerContext(head_dim=32, side=side, tile=32, layer=3)  # type: ignore[arg-type]
    built = UniformConfig(bits=3, axis="channel", group=16).build(context)
    assert isinstance(built, UniformQuantizer)
    assert (built.fmt.bits, built.fmt.axis, built.fmt.group, built.fmt.tile) == (3, "channel", 16, 32)
    assert built.fmt.layout == ("token" if side == "key" else "channel")
    assert isinstance(UniformConfig(bits=16).build(context), FullQuantizer)
    with pytest.raises(ConfigError, match=f"{side} quantizer of layer 3: group=5 must divide 32"):
        UniformConfig(bits=4, group=5).build(context)
