"""Positions further on than what was read: what texts and prompts tell is averaged over them."""

from __future__ import annotations

from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from tiny import fresh_seed
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fade_core import FadeConfig, RopeScheme, create_tiered_cache
from fade_core.interfaces import PromptView, Quantizer
from fade_quant_rotated import prompt as prompt_statistics
from fade_quant_rotated.calibrate import calibrate
from fade_quant_rotated.calibration import Calibration
from fade_quant_rotated.reach import REACH, Turns, distances, reach_of, rotations, turned_apart, turns_of
from fade_quant_rotated.statistics import LayerSums

needs_rope = pytest.mark.skipif(find_spec("fade_rope") is None, reason="fade-rope is not installed")


def test_reach_ends_where_the_model_does() -> None:
    def trained(positions: int) -> SimpleNamespace:
        return SimpleNamespace(max_position_embeddings=positions)

    assert reach_of(trained(32768)) == REACH
    assert reach_of(trained(2048)) == 2048
    assert reach_of(trained(32768), 20_000) == 20_000
    assert reach_of(trained(4096), 20_000) == 4096
    assert reach_of(SimpleNamespace()) == REACH


def model(rope_type: str = "default") -> LlamaForCausalLM:
    """Keys about a mean, as biases make it, in channels that turn slowly."""
    torch.manual_seed(3)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, initializer_range=0.2, max_position_embeddings=2048,
            rope_parameters={"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 2.0}, attention_bias=True,
        )
    ).eval()  # fmt: skip
    for layer in llama.model.layers:
        torch.nn.init.constant_(layer.self_attn.k_proj.bias, 4.0)
    return llama


def learnt(reach: int, rope_type: str = "default") -> tuple[LlamaForCausalLM, Calibration]:
    llama, generator = model(rope_type), torch.Generator().manual_seed(11)
    texts = [torch.randint(0, 64, (128,), generator=generator) for _ in range(12)]
    return llama, calibrate(llama, texts, bits=2.0, sinks=2, window=16, reach=reach)


@torch.no_grad()
def unstored(reach: int, start: int) -> float:
    """Energy of keys at positions ``start`` and on, a key, in channels that the file gives no bits."""
    llama, found = learnt(reach)
    cache, ids = DynamicCache(config=llama.config), torch.arange(128)[None] % 64
    llama(ids, past_key_values=cache, position_ids=torch.arange(start, start + 128)[None])
    keys, side = cache.layers[1].keys[0], found.sides["key"][1]
    widths = found.plan(2.0, (0, 1, 2, 3, 4)).widths["key"][1]
    y = (keys - side.mean[:, None]) @ side.transform.float()
    lost = (y * (widths == 0)[:, None]) @ side.inverse()
    return float(lost.square().sum(-1).mean())


@needs_rope
def test_a_file_for_far_positions_stores_what_is_there() -> None:
    near, far = unstored(1, 1800), unstored(2048, 1800)
    assert far < 0.7 * near, (near, far)


@needs_rope
def test_a_file_says_how_far_it_reaches_and_repeats_bit_for_bit() -> None:
    (_, found), (_, again) = learnt(2048), learnt(2048)
    assert found.notes["reach"] == 2048
    assert learnt(1)[1].notes["reach"] == 128
    assert learnt(2048, "dynamic")[1].notes["reach"] == 128  # frequencies that change with the length: nobody knows
    for side, layers in found.sides.items():
        assert all(torch.equal(ours.transform, again.sides[side][n].transform) for n, ours in layers.items())


# --- moments over the positions to come ---


class Partial(RopeScheme):
    """Turns channels ``i`` and ``i + 3`` of the first six; the others carry no position."""

    kind = "partial"
    speeds = torch.tensor([1.0, 0.05, 0.0005])

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions[..., None] * self.speeds
        (a, b), rest = x[..., :6].chunk(2, -1), x[..., 6:]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rotate(x, -positions)


def test_a_rotation_is_what_the_scheme_does_to_a_key() -> None:
    torch.manual_seed(fresh_seed())
    turns, key = rotations(Partial(), 8, torch.device("cpu"), 500), torch.randn(8)
    offsets = (torch.linspace(0, 1, len(turns)).double() ** 4 * 500).round().long()
    moved = Partial().rotate(key.expand(1, 1, len(turns), -1), offsets[None, None])[0, 0]
    torch.testing.assert_close((turns @ key.double()).float(), moved)


def test_keys_are_turned_to_distances_of_their_own() -> None:
    seed = fresh_seed()
    keys = torch.randn(200, 8, generator=torch.Generator().manual_seed(seed))
    found = turned_apart(Partial(), keys, 500, torch.Generator().manual_seed(seed))
    each = torch.stack(
        [
            Partial().rotate(keys[:, None], torch.full((200, 1), int(by)))[:, 0]
            for by in distances(200, 500, keys.device)
        ]
    )
    apart = (each - found).abs().amax(-1)  # [distance, key]
    assert bool((apart.amin(0) < 1e-5).all())  # every key came at one of them
    assert len(set(apart.argmin(0).tolist())) > 40  # and not all at the same


def test_sums_are_averaged_as_if_tokens_came_at_each_position() -> None:
    torch.manual_seed(fresh_seed())
    turns = rotations(Partial(), 8, torch.device("cpu"), 300)
    keys, values, queries = (torch.randn(2, 40, 8, dtype=torch.float64) for _ in range(3))
    weights = torch.rand(2, 2, 40, dtype=torch.float64)

    def sums(turn: Tensor) -> LayerSums:
        found = LayerSums.empty(8, torch.eye(8).expand(2, 1, -1, -1))
        found.add(keys @ turn.T, values, weights[0], weights[1], sinks=3)
        turned = queries @ turn.T
        found.query_square += turned.transpose(-1, -2) @ turned
        return found

    each = [vars(sums(turn)) for turn in turns]
    found = vars(sums(torch.eye(8, dtype=torch.float64)).turned(Turns(turns)))
    for name, mine in found.items():
        wanted = sum(one[name] for one in each) / len(each)
        torch.testing.assert_close(
            torch.as_tensor(mine, dtype=torch.float64), torch.as_tensor(wanted, dtype=torch.float64)
        )


@pytest.mark.parametrize("pairs", [True, False])
def test_an_average_over_rotations_is_the_average_of_each(pairs: bool) -> None:
    torch.manual_seed(fresh_seed())
    turns = rotations(Partial(), 8, torch.device("cpu"), 300)
    if not pairs:  # nothing that turns channels in threes is known, but a scheme may
        turns = turns @ torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    square = torch.randn(3, 8, 8, dtype=torch.float64)
    wanted = torch.stack([turn @ square @ turn.T for turn in turns]).mean(0)
    torch.testing.assert_close(Turns(turns).average(square), wanted)


def test_schemes_that_turn_alike_share_their_averages() -> None:
    """Each prompt brings a new object of the same scheme."""

    class Other(Partial):
        speeds = torch.tensor([1.0, 0.05, 0.000501])

    cpu = torch.device("cpu")
    shared = turns_of(Partial(), 8, cpu, 300)
    assert turns_of(Partial(), 8, cpu, 300) is shared
    square = torch.randn(1, 8, 8, dtype=torch.float64)
    for other in (turns_of(Other(), 8, cpu, 300), turns_of(Partial(), 8, cpu, 301)):
        assert not torch.equal(other.average(square), shared.average(square))


@torch.no_grad()
def lost_later(monkeypatch: pytest.MonkeyPatch, known: bool, start: int) -> float:
    """Share of the energy of keys at positions ``start`` and on that codes learnt from positions 0 to 127 lose."""
    llama, side = model(), {"kind": "self-calibrated", "bits": 2.0}
    with monkeypatch.context() as patch:
        if not known:
            patch.setattr("fade_core.cache.builder.known_scheme", lambda *_: None)
        cache = create_tiered_cache(llama, FadeConfig(n_sink=2, recent_window=16, tile=16, keys=side, values=side))
    ids = torch.randint(0, 64, (1, 256), generator=torch.Generator().manual_seed(11))
    with cache:
        llama(ids[:, :128], past_key_values=cache)
        quantizer: Quantizer = cache.tiered[1].plan.ladder.tiers[0].keys
    later = DynamicCache(config=llama.config)
    llama(ids[:, 128:], past_key_values=later, position_ids=torch.arange(start, start + 128)[None])
    keys = later.layers[1].keys
    return float((quantizer.decode(quantizer.encode(keys)) - keys).square().sum() / keys.square().sum())


@needs_rope
def test_codes_learnt_from_a_prompt_last(monkeypatch: pytest.MonkeyPatch) -> None:
    near, far = (lost_later(monkeypatch, True, start) for start in (128, 1800))
    assert far < 1.7 * near, (near, far)
    assert far < 0.7 * lost_later(monkeypatch, False, 1800)  # without the averages


def test_what_turns_nobody_knows_how_counts_a_share_of_the_mean_as_variance() -> None:
    torch.manual_seed(fresh_seed())
    tokens = [torch.randn(1, heads, 64, 8) + 2 for heads in (4, 2, 2)]
    seen = torch.ones(64, 64, dtype=torch.bool).tril()[None, None]
    view = PromptView(*tokens, 0.3, None, None, lambda part: seen[:, :, part], torch.nn.Identity())
    found = [prompt_statistics.moments_of(view, drift=drift)[0] for drift in (0.0, 0.4)]
    grown = (found[1].key_cov - found[0].key_cov).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(grown.sum(-1), 0.4 * found[0].key_mean.square().sum(-1))
