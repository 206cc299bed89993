"""A cache of fixed size generates what the growing one does, in every mode, and encodes the same tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from modes import MODES, Result, tiny_task
from test_modes import FAMILIES, PACKED, model_of
from tinymodels import fresh_seed
from transformers import PreTrainedModel

from fade_core import TieredKVCache, create_tiered_cache
from fade_core.cache.fixed import FixedLayer
from fade_core.errors import UnsupportedModelError
from fade_core.support.memory import live_bytes

REFUSED = {  # transformers' own sliding window of fixed size takes no tokens back and keeps its rows
    ("gemma3_text", mode) for mode in ("prompt_lookup", "assisted", "early_exit", "contrastive", "rows_by_hand")
}


def run(model: PreTrainedModel, mode: str, seed: int, packed: str, **options: Any) -> tuple[Result, TieredKVCache]:
    with create_tiered_cache(model, PACKED[packed], **options) as cache:
        return MODES[mode](tiny_task(model, seed), lambda padding: cache), cache


CASES = [(f, [*PACKED][(i + j) % len(PACKED)], m) for i, f in enumerate(FAMILIES) for j, m in enumerate(MODES)]


@pytest.mark.parametrize(("family", "packed", "mode"), CASES)
def test_fixed_is_the_growing_cache(family: str, packed: str, mode: str) -> None:
    model, seed = model_of(family), fresh_seed()
    if (family, mode) in REFUSED:
        with pytest.raises(UnsupportedModelError, match=r"StaticSlidingWindowLayer .* without max_cache_len"):
            run(model, mode, seed, packed, max_cache_len=300)
        return
    wanted, growing = run(model, mode, seed, packed)
    found, fixed = run(model, mode, seed, packed, max_cache_len=300)
    assert all(type(layer) is FixedLayer for layer in fixed.tiered)
    for ours, theirs in zip(found.tokens, wanted.tokens, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * float(theirs.std()))
    for ours, theirs in zip(fixed.tiered, growing.tiered, strict=True):
        ours.settle()
        assert ours.logical == theirs.logical
        assert torch.equal(ours.tier_map(), theirs.tier_map())
        for mine, his in zip(ours.stores[0].packed(), theirs.stores[0].packed(), strict=True):
            live = torch.arange(ours.stores[0].tiles) < ours.stores[0].per_head[:, :1]
            for name in mine.fields:
                assert torch.equal(mine.fields[name].transpose(1, 2)[live], his.fields[name].transpose(1, 2)[live])
    assert fixed.memory_report().total == live_bytes(fixed)
