"""A model's attention is FADE's in passes that carry a FADE cache, and its own at all other times."""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import feed
from tiny import fresh_seed, tiny_llama
from torch import Tensor
from transformers import DynamicCache

from fade_core import create_tiered_cache

EXACT: dict[str, Any] = {"n_sink": 4, "recent_window": 16, "tile": 16, "ladder": [{"tier": "fp16"}]}
EVICTING: dict[str, Any] = {"n_sink": 4, "recent_window": 16, "tile": 16, "policy": {"kind": "h2o", "budget": 0.5}}


@pytest.fixture
def model() -> Any:
    found = tiny_llama(fresh_seed(), layers=2).double()
    found.generation_config.pad_token_id = 0
    found.set_attn_implementation("eager")
    return found


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(fresh_seed())
    return torch.randint(1, 255, (1, 70))


def names_seen(model: Any, run: Callable[[], Any]) -> list[str]:
    """What the model's attention is called inside its first layer, pass by pass."""
    seen: list[str] = []
    attention = model.model.layers[0].self_attn
    hook = attention.register_forward_pre_hook(lambda *_: seen.append(model.config._attn_implementation))
    try:
        run()
    finally:
        hook.remove()
    return seen


@torch.no_grad()
def weights(model: Any, ids: Tensor, cache: Any) -> tuple[Tensor, ...] | None:
    found: tuple[Tensor, ...] | None = model(ids, past_key_values=cache, output_attentions=True).attentions
    return found


def test_only_passes_with_the_cache_run_fades_attention(model: Any, ids: Tensor) -> None:
    cache = create_tiered_cache(model, **EXACT)
    assert model.config._attn_implementation == "eager"
    assert names_seen(model, lambda: feed(model, ids, cache)) == ["fade"]
    assert names_seen(model, lambda: model.model(ids[:, :1], past_key_values=cache)) == ["fade"]
    assert names_seen(model, lambda: model(ids, None, None, create_tiered_cache(model, **EXACT))) == ["fade"]
    assert names_seen(model, lambda: feed(model, ids, DynamicCache(config=model.config))) == ["eager"]
    assert names_seen(model, lambda: model(ids)) == ["eager"]
    cache.detach()
    assert names_seen(model, lambda: feed(model, ids[:, :1], cache)) == ["eager"]
    assert model.config._attn_implementation == "eager"


def test_what_carries_no_cache_of_fades_is_as_without_one(model: Any, ids: Tensor) -> None:
    wanted = weights(model, ids, DynamicCache(config=model.config))
    cache = create_tiered_cache(model, **EXACT)
    feed(model, ids, cache)
    found = weights(model, ids, DynamicCache(config=model.config))
    assert wanted is not None and found is not None and len(wanted) == 2
    assert all(map(torch.equal, found, wanted))
    copied = copy.deepcopy(model)
    assert copied.config._attn_implementation == "eager"
    assert torch.equal(copied(ids).logits, model(ids).logits)


def test_a_copy_of_a_model_runs_caches_too(model: Any, ids: Tensor) -> None:
    with create_tiered_cache(model, **EXACT) as cache:
        copied = copy.deepcopy(model)
        wanted = feed(model, ids, cache)
    with create_tiered_cache(copied, **EXACT) as own:
        assert names_seen(copied, lambda: feed(copied, ids, own)) == ["fade"]
        own.reset()
        assert torch.equal(feed(copied, ids, own), wanted)
    assert copied.config._attn_implementation == model.config._attn_implementation == "eager"


def test_an_attention_that_is_set_meanwhile_stays(model: Any, ids: Tensor) -> None:
    with create_tiered_cache(model, **EXACT) as cache:
        model.set_attn_implementation("sdpa")
        feed(model, ids, cache)
        assert names_seen(model, lambda: model(ids)) == ["sdpa"]
    assert model.config._attn_implementation == "sdpa"


def test_continuous_batching_beside_a_live_cache(model: Any, ids: Tensor) -> None:
    """Without a GPU it is refused by the attention's name, before all else, where that is not one it knows."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    with create_tiered_cache(model, **EXACT) as cache:
        feed(model, ids, cache)
        manager = ContinuousBatchingManager.__new__(ContinuousBatchingManager)
        manager.switch_to_cb_friendly_attn(model, auto_switch_to_flash=False)
        assert model.config._attn_implementation == "paged|eager"
        model.set_attn_implementation("eager")


def test_weights_of_a_cache_that_holds_all_tokens(model: Any, ids: Tensor) -> None:
    """Eager attention runs then, and says that it does."""
    wanted = DynamicCache(config=model.config)
    with create_tiered_cache(model, **EXACT) as cache:
        for part in (ids, ids[:, :1], ids[:, :3]):
            with pytest.warns(UserWarning, match=r"output_attentions=True: the model's eager attention.*DynamicCache"):
                found = weights(model, part, cache)
            exact = weights(model, part, wanted)
            assert found is not None and exact is not None
            for ours, theirs in zip(found, exact, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("implementation", "options", "advice"),
    [
        ("sdpa", EXACT, r"set_attn_implementation\('eager'\)"),
        ("eager", EVICTING, "pass a DynamicCache"),
        ("eager", EXACT | {"max_cache_len": 200}, "pass a DynamicCache"),
    ],
)
def test_weights_that_there_are_not_are_told(
    model: Any, ids: Tensor, implementation: str, options: dict[str, Any], advice: str
) -> None:
    model.set_attn_implementation(implementation)
    with create_tiered_cache(model, **options) as cache:
        with pytest.warns(UserWarning, match=f"no attention weights: .*{advice}"):
            weights(model, ids, cache)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            feed(model, ids[:, :1], cache)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_pass_that_is_interrupted_leaves_the_model_its_own(
    model: Any, ids: Tensor, error: type[BaseException]
) -> None:
    def stop(*_: Any) -> None:
        raise error("stop")

    with create_tiered_cache(model, **EXACT) as cache:
        hook = model.model.layers[1].register_forward_pre_hook(stop)
        with pytest.raises(error):
            feed(model, ids, cache)
        hook.remove()
        assert names_seen(model, lambda: model(ids)) == ["eager"]
        assert model.config._attn_implementation == "eager"
        assert names_seen(model, lambda: feed(model, ids, cache)) == ["fade"]


def test_another_thread_keeps_the_models_own_attention(model: Any, ids: Tensor) -> None:
    """It runs a whole pass while this one is inside one of FADE's, weights, masks and all."""
    mask = torch.ones_like(ids)
    mask[:, :9] = 0
    wanted = model(ids, attention_mask=mask, output_attentions=True).attentions
    found: list[Any] = []

    def beside() -> None:
        found.append(model(ids, attention_mask=mask, output_attentions=True).attentions)

    def start(*_: Any) -> None:
        if not found:
            thread = threading.Thread(target=beside)
            thread.start()
            thread.join()

    with create_tiered_cache(model, **EXACT) as cache:
        attention = model.model.layers[1]
        hook = attention.register_forward_pre_hook(lambda *_: start() if threading.current_thread() is main else None)
        main = threading.current_thread()
        feed(model, ids, cache)
        hook.remove()
    assert len(found[0]) == 2
    torch.testing.assert_close(found[0], wanted, rtol=0, atol=0, equal_nan=True)  # padded queries see nothing
