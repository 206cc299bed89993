"""KIVI as a packed format: its groups, its bytes, its attention, and where it cannot be built."""

from __future__ import annotations

import pytest
import torch
from tiny import fresh_seed, tiny_llama
from torch import Tensor

from fade_core import FadeConfig, create_tiered_cache, get_quantizer
from fade_core.builtin.quantizers.kivi import BITS, KiviConfig, KiviQuantizer
from fade_core.errors import ConfigError
from fade_core.testing import check_quantizer


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(fresh_seed())


def grid(groups: Tensor, bits: int) -> Tensor:
    """KIVI's asymmetric codes of ``[..., group]``, written out: nearest of ``2 ** bits`` levels from minimum to maximum."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return ((groups - low) / step).round() * step + low


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("side", ["key", "value"])
def test_codes_are_those_of_the_paper(bits: int, side: str) -> None:
    x = torch.randn(2, 3, 128, 64) * 2 + 1
    x[..., 5] *= 30
    quantizer = get_quantizer("kivi", head_dim=64, bits=bits, side=side)
    found = quantizer.decode(quantizer.encode(x))
    if side == "key":
        groups = x.transpose(-1, -2).unflatten(-1, (-1, 32))  # [B, H, D, g, 32]
        wanted = grid(groups, bits).flatten(-2).transpose(-1, -2)
    else:
        groups = x.unflatten(-1, (-1, 32))
        wanted = grid(groups, bits).flatten(-2)
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    size = (groups.abs().amax(-1) + step).unsqueeze(-1).expand_as(groups)
    step, size = (t.flatten(-2) for t in (step.unsqueeze(-1).expand_as(groups), size))
    if side == "key":
        step, size = step.transpose(-1, -2), size.transpose(-1, -2)
    moved = (found - wanted).abs()
    # fp16's rounding of scale and minimum moves every level a little; an element near the middle may change its code
    assert float((moved <= 2.0**-8 * size).float().mean()) > 0.98
    assert bool((moved <= step + 2.0**-8 * size).all())
    assert quantizer.bits_per_element == bits + 1
    assert quantizer.encode(x).nbytes * 8 == (bits + 1) * x.numel()


def test_an_outlier_channel_of_the_keys_costs_the_others_nothing() -> None:
    x = torch.randn(1, 1, 64, 64)
    spoilt = x.clone()
    spoilt[..., 7] *= 1000
    keys, values = (get_quantizer("kivi", head_dim=64, bits=2, side=side) for side in ("key", "value"))
    others = [channel for channel in range(64) if channel != 7]
    before, after = (keys.decode(keys.encode(t))[..., others] for t in (x, spoilt))
    assert torch.equal(before, after)
    assert not torch.equal(*(values.decode(values.encode(t))[..., others] for t in (x, spoilt)))


@pytest.mark.parametrize(("tile", "group"), [(64, 32), (48, 16), (32, 8)])
@pytest.mark.parametrize("bits", BITS)
def test_attention_is_that_of_the_decoded_tokens_without_decoding_them(
    bits: int, tile: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = KiviQuantizer(48, bits, "key", 16 if group == 32 else group, tile)
    values = KiviQuantizer(48, bits, "value", 16 if group == 32 else group, tile)
    x, y = torch.randn(2, 3, 111, 48) * 3 + 2, torch.randn(2, 3, 111, 48) - 1
    packed_keys, packed_values = keys.encode(x), values.encode(y)
    query, weights = torch.randn(2, 3, 5, 48), torch.rand(2, 3, 5, 111)
    wanted = query.double() @ keys.decode(packed_keys).double().transpose(-1, -2)
    total = weights.double() @ values.decode(packed_values).double()

    def refuse(*_: object) -> Tensor:
        raise AssertionError("attention reconstructed the cache")

    monkeypatch.setattr(KiviQuantizer, "decode", refuse)
    # sums of 48 or 111 products of numbers around 10 in float32
    torch.testing.assert_close(keys.scores(query, packed_keys).double(), wanted, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(values.combine(weights, packed_values).double(), total, rtol=1e-5, atol=2e-4)


def test_it_conforms() -> None:
    found = check_quantizer(KiviConfig(bits=3, group=16))
    assert found
    assert all(result.passed for result in found), [r for r in found if not r.passed]


@pytest.mark.parametrize(
    ("head_dim", "options", "wanted"),
    [
        (
            64,
            {"side": "key", "tile": 48},
            "groups of 32 do not fill the tokens of a tile, 48; .*group = 16, or tile = 64",
        ),
        (80, {"side": "value"}, "groups of 32 do not fill the channels of a head, 80; write group = 16"),
        (64, {"side": "key", "group": 24}, "groups of 24 .* 64; write group = 8$"),
        (64, {"side": "key", "group": 128, "layer": 3}, "key quantizer of layer 3: .*group = 64, or tile = 128"),
        (64, {"bits": 8}, "bits=8 is not offered; choose one of 2, 3, 4"),
        (64, {"group": 0}, "group"),
    ],
)
def test_what_cannot_be_built_says_what_can(head_dim: int, options: dict[str, int], wanted: str) -> None:
    with pytest.raises(ConfigError, match=wanted):
        get_quantizer("kivi", head_dim=head_dim, **options)


def test_a_cache_decodes_through_it_as_through_both_halves_of_uniform() -> None:
    model = tiny_llama()
    ids = torch.randint(0, 256, (1, 100))

    def logits(keys: dict[str, object], values: dict[str, object]) -> Tensor:
        config = FadeConfig(n_sink=2, recent_window=16, tile=32, keys=keys, values=values)
        with torch.no_grad(), create_tiered_cache(model, config) as cache:
            model(ids[:, :-1], past_key_values=cache)
            return model(ids[:, -1:], past_key_values=cache).logits[0, -1]

    with torch.no_grad():
        exact = model(ids, use_cache=False).logits[0, -1]
    errors = []
    for bits in (2, 4):
        side = {"kind": "kivi", "bits": bits, "group": 16}
        found = logits(side, side)
        uniform = {"kind": "uniform", "bits": bits, "group": 16}
        assert torch.equal(found, logits({**uniform, "axis": "channel"}, uniform))
        errors.append(float((found - exact).norm()))
    assert errors[1] < errors[0] / 2


def test_a_ladder_takes_it_at_other_widths() -> None:
    side = {"kind": "kivi", "group": 16}
    config = FadeConfig(keys=side, values=side, ladder=[{"tier": "int4", "capacity": 64}, {"tier": "int2"}])
    assert [(rung.name, rung.keys) for rung in config.resolved_ladder()] == [
        ("int4", KiviConfig(bits=4, group=16)),
        ("int2", KiviConfig(bits=2, group=16)),
    ]
