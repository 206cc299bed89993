"""Holding a prompt in full precision until its policy knows what it needs, and reading a cache without writing."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from tiny import fresh_seed, tiny_llama

from fade_core import FadeConfig, create_tiered_cache
from fade_core.errors import InputError, UnsupportedModelError
from fade_core.support.memory import live_bytes

LADDER = {
    "n_sink": 2,
    "recent_window": 16,
    "tile": 16,
    "ladder": [{"tier": "int4", "capacity": 48}, {"tier": "int2", "capacity": "rest"}],
    "policy": {"kind": "h2o", "budget": 100, "every": 8},
}


BOTH = pytest.mark.parametrize("max_cache_len", [None, 400])


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(layers=2)


def padded(seed: int, lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random rows of these lengths, padded on the left, and their mask."""
    width = max(lengths)
    ids = torch.randint(1, 255, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return ids * mask, mask


def tensors(cache: Any) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor.clone() for name, tensor in layer.tensors().items()} for layer in cache.tiered]


@pytest.mark.parametrize("axis", ["token", "channel"])
@BOTH
def test_a_held_prompt_goes_where_it_would_have_gone_at_once(model: Any, axis: str, max_cache_len: int | None) -> None:
    """Holding changes when, not what: the same tokens end up in the same tiers, with the same codes."""
    ids, mask = padded(fresh_seed(), (150, 110))
    config = FadeConfig(**LADDER, keys={"kind": "uniform", "axis": axis})
    with create_tiered_cache(model, config, max_cache_len) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        at_once = tensors(cache)
    with create_tiered_cache(model, config, max_cache_len) as cache, torch.no_grad():
        with cache.holding():
            model(ids, attention_mask=mask, past_key_values=cache)
            assert all(bool((layer.held.tier_map()[0] == 0).all()) for layer in cache.tiered)
        for first, later in zip(at_once, tensors(cache), strict=True):
            assert first.keys() == later.keys()
            assert all(torch.equal(tensor, later[name]) for name, tensor in first.items())
        assert cache.memory_report().total == live_bytes(cache, exclude=model)


@BOTH
def test_chunks_and_steps_are_held_and_then_within_the_budget(model: Any, max_cache_len: int | None) -> None:
    ids, mask = padded(fresh_seed(), (160, 120))
    with create_tiered_cache(model, FadeConfig(**LADDER), max_cache_len) as cache, torch.no_grad():
        with cache.holding():
            for start, end in ((0, 50), (50, 140), (140, 141), (141, 160)):
                model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
                assert all(bool((layer.held.tier_map()[0] == 0).all()) for layer in cache.tiered)
        for layer in cache.tiered:
            kept = (layer.held.tier_map() >= 0).sum(-1)
            assert int(kept.max()) <= 100
            assert int(kept.min()) > 100 - 16


@BOTH
def test_after_an_error_nothing_is_ranked_and_the_cache_goes_on(model: Any, max_cache_len: int | None) -> None:
    ids, mask = padded(fresh_seed(), (90,))
    with create_tiered_cache(model, FadeConfig(**LADDER), max_cache_len) as cache, torch.no_grad():
        with contextlib.suppress(KeyboardInterrupt), cache.holding():
            model(ids[:, :80], attention_mask=mask[:, :80], past_key_values=cache)
            raise KeyboardInterrupt
        model(ids[:, 80:], attention_mask=mask, past_key_values=cache)
        assert cache.get_seq_length() == 90
        assert all(int((layer.held.tier_map() > 0).sum()) > 0 for layer in cache.tiered)


@pytest.mark.parametrize("queries", [3, 50])
@BOTH
def test_reading_gives_what_feeding_gives_and_leaves_no_token(
    model: Any, queries: int, max_cache_len: int | None
) -> None:
    ids, mask = padded(fresh_seed(), (150, 110))
    new = ids[:, :queries].clamp_min(1)
    seen = torch.cat([mask, torch.ones_like(new)], 1)
    with create_tiered_cache(model, FadeConfig(**LADDER), max_cache_len) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        before = tensors(cache)
        with cache.reading():
            read = [model(new, attention_mask=seen, past_key_values=cache).logits for _ in range(2)]
            assert cache.get_seq_length() == 150
        assert torch.equal(*read)
        for held, now in zip(before, tensors(cache), strict=True):
            assert {name.split("/")[-1].removeprefix("tiles.") for name in now.keys() - held.keys()} <= {"ids", "valid"}
            assert all(torch.equal(tensor, now[name]) for name, tensor in held.items())
        fed = model(new, attention_mask=seen, past_key_values=cache).logits
        torch.testing.assert_close(fed, read[0], rtol=0, atol=256 * torch.finfo(fed.dtype).eps * float(fed.std()))
        assert cache.get_seq_length() == 150 + queries


@BOTH
def test_an_interrupted_reading_leaves_no_token(model: Any, max_cache_len: int | None) -> None:
    ids, mask = padded(fresh_seed(), (90,))
    with create_tiered_cache(model, FadeConfig(**LADDER), max_cache_len) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        keys = torch.zeros(
            1, *cache.tiered[0].held.window.keys.shape[1:2], 4, cache.tiered[0].held.window.keys.shape[3]
        )
        with contextlib.suppress(KeyboardInterrupt), cache.reading():
            cache.update(keys, keys, 0)
            raise KeyboardInterrupt
        assert [layer.logical for layer in cache.tiered] == [90, 90]
        model(ids[:, :1], past_key_values=cache)
        assert [layer.logical for layer in cache.tiered] == [91, 91]


def test_what_cannot_be_read_says_why(model: Any) -> None:
    with create_tiered_cache(model, config=FadeConfig()) as cache:
        assert cache.unreadable == ""
        with pytest.raises(InputError, match="nothing to read yet"), cache.reading():
            pass
    with create_tiered_cache(model, config=FadeConfig(attention="stock")) as cache:
        assert cache.unreadable == "the model keeps its own attention"
        with pytest.raises(UnsupportedModelError, match="without writing into it: the model keeps"), cache.reading():
            pass


@pytest.mark.parametrize("chunk", [None, 40])
@BOTH
def test_prefill_is_the_models_own_pass_unless_a_policy_has_another(
    model: Any, chunk: int | None, max_cache_len: int | None
) -> None:
    ids, mask = padded(fresh_seed(), (150, 110))
    places = (mask.cumsum(1) - 1).clamp_min(0)
    with create_tiered_cache(model, FadeConfig(**LADDER), max_cache_len) as cache, torch.no_grad():
        for start in range(0, 150, chunk or 150):
            part = slice(start, start + (chunk or 150))
            wanted = model(
                ids[:, part],
                attention_mask=mask[:, : part.stop],
                position_ids=places[:, part],
                past_key_values=cache,
                logits_to_keep=2,
            ).logits
        by_hand = tensors(cache)
    with create_tiered_cache(model, FadeConfig(**LADDER), max_cache_len) as cache:
        found = cache.prefill(model, ids, mask, chunk=chunk, logits_to_keep=2).logits
        assert not found.requires_grad
        assert torch.equal(found, wanted)
        for first, later in zip(by_hand, tensors(cache), strict=True):
            assert all(torch.equal(tensor, later[name]) for name, tensor in first.items())
        with pytest.raises(InputError, match="the cache holds 150 tokens; prefill takes an empty one"):
            cache.prefill(model, ids)
        cache.reset()
        with pytest.raises(InputError, match="chunk=0 must be at least one token"):
            cache.prefill(model, ids, chunk=0)
