from __future__ import annotations

import pytest
import torch

from fade_core.errors import CheckpointError, ConfigError, InputError
from fade_core.interfaces import QuantizerContext
from fade_core.testing import check_quantizer
from fade_quant_rotated import RotatedConfig, RotatedQuantizer
from fade_quant_rotated.levels import from_log8, to_log8
from fade_quant_rotated.lloyd_max import gaussian_distortion, gaussian_levels

CASES = [
    {"bits": 2},
    {"bits": 3, "side": "value"},
    {"bits": 4, "codes": "uniform"},
    {"bits": 4, "codes": "lloyd-max", "side": "value"},
    {"bits": 8, "rotation": "orthogonal"},
    {"bits": 2, "metadata": "log8", "side": "value"},
    {"bits": 3, "metadata": "log8", "group": 16},
    {"bits": 2, "codes": "uniform", "group": 16, "side": "value"},
]


def outlier_tokens(*shape: int) -> torch.Tensor:
    """Gaussian tokens with three loud channels, as keys have them."""
    x = torch.randn(*shape)
    x[..., torch.randperm(shape[-1])[:3]] *= 12
    return x


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("length", [64, 150])
def test_scores_and_combine_equal_attention_over_decoded(case: dict, head_dim: int, length: int, seed: int) -> None:
    quantizer = RotatedQuantizer(head_dim, seed=seed, **case)
    packed = quantizer.encode(outlier_tokens(2, 3, length, head_dim))
    decoded = quantizer.decode(packed).double()
    query, weights = torch.randn(2, 3, 5, head_dim), torch.rand(2, 3, 5, length).softmax(-1)
    wanted_scores, wanted = query.double() @ decoded.transpose(-1, -2), weights.double() @ decoded
    close = {"atol": 3e-6 * head_dim * float(decoded.abs().max()), "rtol": 1e-5}
    torch.testing.assert_close(quantizer.scores(query, packed).double(), wanted_scores, **close)
    torch.testing.assert_close(quantizer.combine(weights, packed).double(), wanted, **close)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fields_are_what_was_promised_and_bits_are_counted(case: dict, seed: int) -> None:
    quantizer = RotatedQuantizer(64, **case)
    packed = quantizer.encode(torch.randn(2, 3, 256, 64))
    shapes = quantizer.field_shapes()
    assert {n: (tuple(f.shape[3:]), f.dtype) for n, f in packed.fields.items()} == shapes
    assert packed.nbytes * 8 == quantizer.bits_per_element * 2 * 3 * 256 * 64


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lloyd_max_error_on_gaussian_tokens_is_the_theory(bits: int, seed: int) -> None:
    x = torch.randn(1, 1, 2048, 128)
    for side in ("key", "value"):
        quantizer = RotatedQuantizer(128, bits, side, codes="lloyd-max")
        back = quantizer.decode(quantizer.encode(x))
        error = float((back - x).square().mean())
        theory = gaussian_distortion(bits) / (1 if side == "key" else 1 - gaussian_distortion(bits))
        assert 0.9 * theory < error < 1.1 * theory
        bias = float((back * x).sum() / x.square().sum() - 1)
        assert abs(bias) < 2e-3 if side == "value" else abs(bias + theory) < 0.1 * theory + 2e-3


def test_rotation_is_worth_it_on_outliers(seed: int) -> None:
    x = outlier_tokens(1, 2, 512, 128)
    errors = {}
    for codes, bits in (("uniform", 2), ("lloyd-max", 2), ("auto", 2)):
        quantizer = RotatedQuantizer(128, bits, codes=codes)
        errors[codes] = float((quantizer.decode(quantizer.encode(x)) - x).square().mean() / x.square().mean())
    assert errors["auto"] == errors["lloyd-max"] < 0.8 * errors["uniform"]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_select_moves_tokens_without_touching_codes(case: dict, seed: int) -> None:
    quantizer = RotatedQuantizer(80, **case)
    packed = quantizer.encode(torch.randn(2, 3, 192, 80))
    index = torch.stack([torch.randperm(192)[:128] for _ in range(6)]).view(2, 3, 128)
    wanted = quantizer.decode(packed).gather(2, index[..., None].expand(-1, -1, -1, 80))
    assert torch.equal(quantizer.decode(quantizer.select(packed, index)), wanted)
    with pytest.raises(InputError, match="multiple of the tile"):
        quantizer.select(packed, index[..., :100])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_huge_and_half_precision_tokens_stay_finite(case: dict, seed: int) -> None:
    quantizer = RotatedQuantizer(64, **case)
    x = torch.randn(1, 1, 64, 64)
    x[..., 0, :], x[..., 1, :] = 0, 600 * x[..., 1, :]
    back = quantizer.decode(quantizer.encode(x.bfloat16()))
    assert back.dtype == torch.bfloat16 and bool(back.isfinite().all())
    assert float(back[..., 0, :].float().abs().max()) < 1e-4
    relative = (back[..., 1, :].float() - x[..., 1, :]).norm() / x[..., 1, :].norm()
    assert float(relative) < 0.75


def test_transforms_are_what_scores_and_combine_do(seed: int) -> None:
    quantizer = RotatedQuantizer(96, 3, "value")
    packed = quantizer.encode(torch.randn(1, 2, 128, 96))
    weights = torch.rand(1, 2, 4, 128)
    inside = quantizer.codes.combine(weights, packed)
    outside = quantizer.transform_output(inside, weights.sum(-1, keepdim=True))
    torch.testing.assert_close(outside, quantizer.combine(weights, packed), atol=1e-5, rtol=1e-5)
    assert quantizer.format is not None and quantizer.format.levels == gaussian_levels(3)


def test_state_restores_another_seed(seed: int) -> None:
    x = torch.randn(1, 1, 64, 64)
    for kind in ("hadamard", "orthogonal"):
        one, other = (RotatedQuantizer(64, rotation=kind, seed=s) for s in (seed, seed + 1))
        packed = one.encode(x)
        assert not torch.equal(other.decode(packed), one.decode(packed))
        other.load_state_dict(one.state_dict())
        assert torch.equal(other.decode(packed), one.decode(packed))
        with pytest.raises(CheckpointError):
            other.load_state_dict({})
    assert one.state_bytes() == 64 * 64 * 4


def test_log8_scales_round_to_within_a_step(seed: int) -> None:
    scale = torch.exp2(torch.rand(10_000) * 30 - 19)
    back = from_log8(to_log8(scale))
    assert float((torch.log2(back) - torch.log2(scale)).abs().max()) <= 1 / 16 + 1e-4
    assert float(from_log8(to_log8(torch.zeros(1)))) == 0


def test_config_builds_both_sides_and_refuses() -> None:
    config = RotatedConfig(bits=2, rotation="orthogonal", seed=7)
    keys = config.build(QuantizerContext(head_dim=96, side="key"))
    values = config.build(QuantizerContext(head_dim=96, side="value", tile=128))
    assert keys.format is not None and keys.format.layout == "token"
    assert values.format is not None and values.format.layout == "channel" and values.tile == 128
    assert config.with_bits(4).bits == 4 and config.with_bits(4).seed == 7
    with pytest.raises(ConfigError, match="2, 3, 4, 8"):
        RotatedConfig(bits=5)
    with pytest.raises(ConfigError):
        RotatedConfig(unknown=1)
    with pytest.raises(ConfigError, match="value quantizer of layer 3"):
        RotatedConfig(group=7).build(QuantizerContext(head_dim=64, side="value", layer=3))
    with pytest.raises(ConfigError, match="log8"):
        RotatedConfig(codes="uniform", metadata="log8").build(QuantizerContext(head_dim=64))


def test_wrong_shapes_are_refused() -> None:
    quantizer = RotatedQuantizer(64)
    bad_ones = (
        torch.randn(1, 1, 5, 32),
        torch.randn(1, 5, 64),
        torch.randn(1, 1, 0, 64),
        torch.ones(1, 1, 5, 64).int(),
    )
    for bad in bad_ones:
        with pytest.raises(InputError, match="rotated"):
            quantizer.encode(bad)


@pytest.mark.parametrize(
    "config",
    [
        RotatedConfig(bits=4),
        RotatedConfig(bits=2, rotation="orthogonal"),
        RotatedConfig(bits=3, metadata="log8"),
    ],
    ids=str,
)
def test_conformance(config: RotatedConfig, seed: int) -> None:
    results = check_quantizer(config, seed=seed)
    assert all(result.passed for result in results), [r for r in results if not r.passed]
