"""Masks that hide padding alone have a column a token, not one a query and token; others are honoured as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tinymodels import fresh_seed, left_padded, prompt, tiny
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache

EXACT = FadeConfig(n_sink=4, recent_window=16, tile=16, ladder=[{"tier": "fp16"}])
LENGTHS = (160, 97, 1)


class Largest(TorchDispatchMode):
    """The most elements of a boolean tensor that any operation has made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.dtype == torch.bool:
                type(self).elements = max(type(self).elements, leaf.untyped_storage().nbytes())
        return made


@pytest.fixture
def network() -> PreTrainedModel:
    return tiny("llama", fresh_seed())


@pytest.fixture
def padded() -> dict[str, Tensor]:
    seed = fresh_seed()
    return left_padded([prompt(seed + n, length)[0] for n, length in enumerate(LENGTHS)])


@torch.no_grad()
def fed(model: PreTrainedModel, cache: Any, inputs: dict[str, Tensor], chunk: int) -> Tensor:
    """Logits of the last token of each chunk, ``[B, chunks, vocabulary]``."""
    ids, mask, found = inputs["input_ids"], inputs["attention_mask"], []
    for end in range(chunk, ids.shape[1] + 1, chunk):
        part = model(ids[:, end - chunk : end], attention_mask=mask[:, :end], past_key_values=cache, logits_to_keep=1)
        found.append(part.logits)
    return torch.cat(found, 1)


def only_where_seen(logits: Tensor, inputs: dict[str, Tensor], chunk: int) -> Tensor:
    return logits[inputs["attention_mask"][:, chunk - 1 :: chunk].bool()]


@pytest.mark.parametrize("chunk", [160, 40])
@pytest.mark.parametrize("max_cache_len", [None, 400])
def test_padding_is_left_out_as_by_the_dynamic_cache(
    network: PreTrainedModel, padded: dict[str, Tensor], chunk: int, max_cache_len: int | None
) -> None:
    wanted = fed(network, DynamicCache(config=network.config), padded, chunk)
    with create_tiered_cache(network, EXACT, max_cache_len) as cache:
        found = fed(network, cache, padded, chunk)
        assert cache.leading_padding.tolist() == [160 - length for length in LENGTHS]
    seen = [only_where_seen(logits, padded, chunk) for logits in (found, wanted)]
    torch.testing.assert_close(seen[0], seen[1], rtol=0, atol=1e-9 * float(wanted.std()))


@pytest.mark.parametrize("chunk", [160, 40])
def test_other_caches_on_the_model_get_the_mask_that_they_need(
    network: PreTrainedModel, padded: dict[str, Tensor], chunk: int
) -> None:
    wanted = fed(network, DynamicCache(config=network.config), padded, chunk)
    with create_tiered_cache(network, EXACT):
        found = fed(network, DynamicCache(config=network.config), padded, chunk)
    assert torch.equal(*(only_where_seen(logits, padded, chunk) for logits in (found, wanted)))


@pytest.fixture
def recorded() -> Iterator[type[Largest]]:
    Largest.elements = 0
    with Largest():
        yield Largest


@pytest.mark.parametrize("chunk", [160, 80])
def test_no_mask_of_a_column_a_query_is_made(
    network: PreTrainedModel, padded: dict[str, Tensor], recorded: type[Largest], chunk: int
) -> None:
    with create_tiered_cache(network, FadeConfig(n_sink=4, recent_window=16, tile=16)) as cache:
        fed(network, cache, padded, chunk)
    whole = len(LENGTHS) * chunk * 160
    tokens = len(LENGTHS) * 160 * network.config.num_key_value_heads * network.config.head_dim
    assert 0 < recorded.elements <= (tokens if chunk < 160 else whole // 2), recorded.elements


def test_holes_in_the_middle_are_honoured(network: PreTrainedModel, padded: dict[str, Tensor]) -> None:
    padded["attention_mask"][0, 30:50] = 0
    wanted = fed(network, DynamicCache(config=network.config), padded, 160)
    with create_tiered_cache(network, EXACT) as cache:
        found = fed(network, cache, padded, 160)
        torch.testing.assert_close(found[:2], wanted[:2], rtol=0, atol=1e-9 * float(wanted.std()))
        token = {"input_ids": torch.ones(3, 1, dtype=torch.long)}
        token["attention_mask"] = torch.cat([padded["attention_mask"], token["input_ids"]], 1)
        step = network(**token, past_key_values=cache).logits
    assert bool(step.isfinite().all())


def test_a_model_that_looks_at_its_masks_gets_them_whole() -> None:
    network = tiny("llama", fresh_seed())
    network._supports_flash_attn = False
    inputs = left_padded([prompt(1, 20)[0], prompt(2, 9)[0]])
    shapes = []

    def note(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(kwargs["attention_mask"].dim())

    for layer in network.model.layers:
        layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
    with create_tiered_cache(network, EXACT) as cache:
        assert isinstance(cache, TieredKVCache)
        fed(network, cache, inputs, 20)
    assert shapes == [4] * len(network.model.layers)
