"""Heads that keep different numbers of tokens: every mode of ``generate`` is still the dense masked reference."""

from __future__ import annotations

import functools

import pytest
import torch
from modes import MODES, tiny_task
from reference import DENSE, Recording, attention, replay_cache, stored
from tinymodels import fresh_seed, left_padded, prompt, tiny
from transformers import PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache

HEADS, TILE = 4, 16
SHORT = {"n_sink": 4, "recent_window": 16, "tile": TILE}
CONFIGS = {
    "tokens": FadeConfig(
        **SHORT,
        keys={"kind": "uniform", "axis": "token"},
        ladder=[{"tier": "int4", "capacity": 0.3}, {"tier": "int2"}],
        policy={"kind": "adakv", "budget": 0.6, "every": 8, "floor": 0.1, "base": {"kind": "h2o"}},
    ),
    "tiles": FadeConfig(
        **SHORT,
        keys={"kind": "uniform", "axis": "channel"},
        policy={"kind": "adakv", "budget": 0.5, "every": 5, "floor": 0.0, "base": {"kind": "snapkv", "window": 8}},
    ),
}
TIERS = {"tokens": ("fp16", "int4", "int2"), "tiles": ("fp16", "int4")}


@functools.cache
def model(layers: int = 1) -> PreTrainedModel:
    return tiny(
        "llama", fresh_seed(), num_hidden_layers=layers, num_key_value_heads=HEADS, num_attention_heads=2 * HEADS
    )


def kept(cache: TieredKVCache) -> list[torch.Tensor]:
    """Tokens stored a row and head, ``[B, H_kv]`` a layer."""
    return [(stored(layer).tier >= 0).sum(-1) for layer in cache.tiered]


@pytest.mark.parametrize(
    ("mode", "name", "max_cache_len"),
    [(mode, [*CONFIGS][i % 2], (None, 300)[i // 2 % 2]) for i, mode in enumerate(MODES)],
)
def test_ragged_heads_are_the_dense_reference(mode: str, name: str, max_cache_len: int | None) -> None:
    task = tiny_task(model(2), fresh_seed())
    with create_tiered_cache(model(2), CONFIGS[name], max_cache_len) as cache:
        recording = Recording(cache)
        found = MODES[mode](task, lambda padding: cache)
    with attention(model(2), DENSE):
        wanted = MODES[mode](task, lambda padding: replay_cache(model(2), recording, TIERS[name]))
    for ours, theirs in zip(found.tokens, wanted.tokens, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-6 * float(theirs.std()))


@pytest.mark.parametrize(("name", "max_cache_len"), [("tokens", None), ("tiles", 400), ("tokens", 400)])
def test_the_budget_is_spent_whatever_the_heads_are_given(name: str, max_cache_len: int | None) -> None:
    """After a prompt and after each of many rankings: to the tile nearest below the budget of all heads of a row."""
    seed, config = fresh_seed(), CONFIGS[name]
    inputs = left_padded([prompt(seed, 190)[0], prompt(seed + 1, 120)[0]])
    share = config.policy.budget
    assert isinstance(share, float)
    with create_tiered_cache(model(), config, max_cache_len) as cache, torch.no_grad():
        model()(**inputs, past_key_values=cache)
        assert any(bool((counts.amax(1) > counts.amin(1)).any()) for counts in kept(cache)), "no row's heads differ"
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        for step in range(24):
            for layer, counts in zip(cache.tiered, kept(cache), strict=True):
                assert int(layer.logical) == ids.shape[1]
                for row, count in enumerate(counts):
                    length, window = int(layer.held.lengths[row]), int(layer.held.window.lengths[row])
                    budget = HEADS * (int(share * length) - window)
                    packed = int(count.sum()) - HEADS * window
                    assert packed <= budget
                    assert packed > budget - TILE - (0 if step == 0 else HEADS * TILE)
            new = prompt(seed + 2 + step, 9, 2)[:, :3]
            ids, mask = torch.cat([ids, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
            model()(input_ids=new, attention_mask=mask, past_key_values=cache)
            cache.rank()


@pytest.mark.parametrize("max_cache_len", [None, 300])
def test_padded_rows_equal_their_unpadded_runs(max_cache_len: int | None) -> None:
    seed, new = fresh_seed(), 24
    rows = [prompt(seed + i, length)[0] for i, length in enumerate((101, 164, 60))]
    options = {"do_sample": False, "max_new_tokens": new, "min_new_tokens": new}
    batch = left_padded(rows)
    width = batch["input_ids"].shape[1]
    with create_tiered_cache(model(), CONFIGS["tokens"], max_cache_len) as together:
        tokens = model().generate(**batch, past_key_values=together, **options)
    for row, ids in enumerate(rows):
        one = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}
        with create_tiered_cache(model(), CONFIGS["tokens"], max_cache_len) as alone:
            own = model().generate(**one, past_key_values=alone, **options)
        assert torch.equal(tokens[row, width - len(ids) :], own[0])
        for ours, theirs in zip(together.tiered, alone.tiered, strict=True):
            assert torch.equal(stored(ours).tier[row, :, width - len(ids) :], stored(theirs).tier[0])
