"""On the real model: calibrating on one text pays on another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_quant_rotated.calibrate import calibrate
from fade_quant_rotated.commands import cut

pytestmark = pytest.mark.real_model

TEXTS = Path(__file__).parents[2] / "fade_eval" / "src" / "fade_eval" / "data" / "texts"
PROMPT, STEPS = 384, 32


@torch.no_grad()
def exactly(model: torch.nn.Module, ids: torch.Tensor, steps: int) -> tuple[DynamicCache, torch.Tensor]:
    """The exact cache of all but the last ``steps`` tokens, and log-probabilities after each of those."""
    past = DynamicCache(config=model.config)
    model(ids[:, :-steps], past_key_values=past, logits_to_keep=1)
    found = after(model, past, ids[:, -steps:])
    past.crop(-steps)
    return past, found


def take_over(cache: TieredKVCache, past: DynamicCache) -> None:
    """The prompt of an exact cache: attention of a prompt is exact, so that it need not be run again."""
    for index, layer in enumerate(past.layers):
        cache.update(layer.keys, layer.values, index)
    cache.settle()


@torch.no_grad()
def after(model: torch.nn.Module, cache: object, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, past_key_values=cache).logits[0].log_softmax(-1)


@pytest.mark.slow
def test_two_calibrated_bits_beat_the_best_rotation_by_far(tmp_path: Path, smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    read = [(TEXTS / f"calibration-{name}-01.txt").read_text("utf-8") for name in ("britannica", "pride_and_prejudice")]
    file = tmp_path / "calibration.safetensors"
    calibrate(model, cut(tokenizer, read, 448, 896)).save(file)
    ids = tokenizer((TEXTS / "demo-alice-07.txt").read_text("utf-8"), return_tensors="pt").input_ids[
        :, : PROMPT + STEPS
    ]
    past, exact = exactly(model, ids, STEPS)
    divergence = {}
    for name, side in (
        ("rotated", {"kind": "rotated", "bits": 2, "metadata": "log8"}),
        ("calibrated", {"kind": "calibrated", "file": str(file), "bits": 2.1}),
        ("shipped", {"kind": "calibrated", "file": "smollm2", "bits": 2.1}),
    ):
        with create_tiered_cache(model, FadeConfig(n_sink=4, recent_window=64, keys=side, values=side)) as cache:
            take_over(cache, past)
            found = after(model, cache, ids[:, -STEPS:])
            tier = cache.tiered[3].plan.ladder.tiers[0]
            assert tier.keys.kind == side["kind"]
        divergence[name] = float((exact.exp() * (exact - found)).sum(-1).mean())
    assert divergence["calibrated"] < 0.4 * divergence["rotated"], divergence
    assert divergence["shipped"] < divergence["calibrated"], divergence  # from ten times as many tokens


@pytest.mark.slow
def test_the_shipped_file_reaches_far_behind_its_texts(smollm2: tuple[Any, Any]) -> None:
    """It was made from pieces of 1,024 tokens."""
    model, tokenizer = smollm2
    ids = tokenizer((TEXTS / "demo-alice-07.txt").read_text("utf-8"), return_tensors="pt").input_ids[:, :1392]
    side = {"kind": "calibrated", "file": "smollm2", "bits": 2.1}
    past, exact = exactly(model, ids, 16)
    with create_tiered_cache(model, FadeConfig(keys=side, values=side)) as cache:
        take_over(cache, past)
        ours = after(model, cache, ids[:, -16:])
    divergence = float((exact.exp() * (exact - ours)).sum(-1).mean())
    assert divergence < 0.05, divergence  # 1.6 at 1,664 tokens if texts are read at their own places alone
