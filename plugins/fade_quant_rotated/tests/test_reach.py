"""Texts are read all over the positions that a calibration is for, and the model is none the wiser."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fade_quant_rotated.calibrate import calibrate
from fade_quant_rotated.calibration import Calibration
from fade_quant_rotated.reach import REACH, places, reach_of


def config(trained: int = 32768, **rope: Any) -> SimpleNamespace:
    return SimpleNamespace(rope_parameters=rope, max_position_embeddings=trained)


def test_reach_ends_where_the_model_or_its_rope_does() -> None:
    assert reach_of(config(rope_type="default")) == REACH
    assert reach_of(config(2048, rope_type="llama3")) == 2048
    assert reach_of(config(rope_type="default"), 20_000) == 20_000
    assert reach_of(config(4096, rope_type="default"), 20_000) == 4096
    layers = {"full_attention": {"rope_type": "default"}, "sliding_attention": {"rope_type": "linear"}}
    assert reach_of(config(**layers)) == REACH
    for kind in ("dynamic", "longrope"):  # other frequencies further on
        assert reach_of(config(rope_type=kind)) == reach_of(config(full={"rope_type": kind})) == 0
    assert reach_of(SimpleNamespace(max_position_embeddings=1024)) == 0  # positions are learnt


def test_starts_cover_the_reach_and_stay_inside() -> None:
    found = places([100] * 16, 8192)
    assert found[0].tolist() == [list(range(100))]
    assert all(int(place.min()) >= 0 and int(place.max()) < 8192 and place.shape == (1, 100) for place in found)
    starts = sorted(int(place[0, 0]) for place in found)
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert max([*gaps, 8192 - 100 - starts[-1]]) < 2.5 * 8192 / 16
    assert [int(place[0, 0]) for place in places([100, 300], 64)] == [0, 0]  # longer than the reach


def model() -> LlamaForCausalLM:
    """Keys about a mean, as biases make it, in channels that turn slowly."""
    torch.manual_seed(3)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, initializer_range=0.2, max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0}, attention_bias=True,
        )
    ).eval()  # fmt: skip
    for layer in llama.model.layers:
        torch.nn.init.constant_(layer.self_attn.k_proj.bias, 4.0)
    return llama


def learnt(reach: int) -> tuple[LlamaForCausalLM, Calibration]:
    llama, generator = model(), torch.Generator().manual_seed(11)
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


def test_a_file_for_far_positions_stores_what_is_there() -> None:
    near, far = unstored(1, 1800), unstored(2048, 1800)
    assert far < 0.7 * near, (near, far)


def test_a_file_says_how_far_it_reaches_and_repeats_bit_for_bit() -> None:
    (_, found), (_, again) = learnt(2048), learnt(2048)
    assert found.notes["reach"] == 2048
    assert learnt(1)[1].notes["reach"] == 128
    for side, layers in found.sides.items():
        assert all(torch.equal(ours.transform, again.sides[side][n].transform) for n, ours in layers.items())
