"""The Triton kernels under a cache with ``max_cache_len``: steps take tokens in and read them by what lies on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import seed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fade_core import FadeConfig, TieredKVCache, apply_tier_assignment_per_sequence, create_tiered_cache
from fade_core.interfaces import Event, TelemetrySink


class Fallbacks(TelemetrySink):
    """Reasons why torch did what a kernel was asked for."""

    def __init__(self) -> None:
        self.reasons: list[Any] = []

    def emit(self, event: Event) -> None:
        if event.kind == "fallback":
            self.reasons.append(event.detail)


SHORT: dict[str, Any] = {"n_sink": 4, "recent_window": 16, "tile": 64}


def model(device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, head_dim=64,
        num_key_value_heads=2, initializer_range=0.1, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device, torch.bfloat16)


def config_of(kind: str, axis: str, **fields: Any) -> FadeConfig:
    """Prompts are encoded by torch: through the interpreter that takes longest, and test_encode.py looks at it."""
    kernel = {"kind": "torch", "append": kind, "decode_attention": kind, "attention_mass": kind}
    return FadeConfig(**SHORT, keys={"kind": "uniform", "axis": axis}, kernel=kernel, **fields)


@torch.no_grad()
def logits(
    llama: LlamaForCausalLM, cache: TieredKVCache, ids: Tensor, steps: Tensor, compiled: bool
) -> tuple[Tensor, Any]:
    fallbacks, mask = Fallbacks(), torch.ones_like(ids)
    cache.sinks.append(fallbacks)
    mask[1, :2] = 0  # padding
    llama(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    forward = torch.compile(llama, backend="eager", fullgraph=True) if compiled else llama
    found = []
    for step in steps.split(1, 1):
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        width, _ = cache.get_mask_sizes(1, 0)
        seen = torch.nn.functional.pad(mask.bool(), (0, width - mask.shape[1]))[:, None, None].contiguous()
        places = mask.sum(1, keepdim=True) - 1
        found.append(
            forward(step, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True).logits
        )
    cache.settle()
    assert not fallbacks.reasons
    store = cache.tiered[0].held.stores[0]
    return torch.cat(found, 1).float(), (store.lengths[:, 0].tolist(), store.view().packed_keys())


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "compiled"), [("channel", True), ("token", False)])
def test_steps_by_the_kernels_are_steps_by_torch(axis: str, compiled: bool, device: str) -> None:
    number = seed()
    torch._dynamo.reset()
    llama = model(device)
    random = torch.Generator().manual_seed(number)
    ids, steps = (torch.randint(1, 64, (2, n), generator=random).to(device) for n in (83, 4))
    found = {}
    for kind in ("torch", "triton"):
        with create_tiered_cache(llama, config_of(kind, axis), max_cache_len=256) as cache:
            found[kind] = logits(llama, cache, ids, steps, compiled and kind == "triton")
    ours, theirs = found["triton"][0], found["torch"][0]
    assert found["triton"][1][0] == found["torch"][1][0] == [64, 64]  # a row's tile went in a step
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02
    mine, his = found["triton"][1][1].fields, found["torch"][1][1].fields
    assert torch.equal(mine["codes4"][:1], his["codes4"][:1])
    torch._dynamo.reset()


@pytest.mark.slow
def test_steps_evict_by_the_kernels_as_by_torch(device: str) -> None:
    """Heads keep tokens of their own: the kernels read each head's number of tiles, and the mass of what it holds."""
    number = seed()
    llama = model(device)
    random = torch.Generator().manual_seed(number)
    ids, steps = (torch.randint(1, 64, (2, n), generator=random).to(device) for n in (270, 5))
    found = {}
    for kind in ("torch", "triton"):
        config = config_of(kind, "token", policy={"kind": "h2o", "budget": 180, "every": 4})
        with create_tiered_cache(llama, config, max_cache_len=512) as cache, torch.no_grad():
            fallbacks, layer = Fallbacks(), cache.tiered[0]
            cache.sinks.append(fallbacks)
            llama(ids, past_key_values=cache, use_cache=True)
            logits_ = []
            for i, step in enumerate(steps.split(1, 1)):
                if i == 2:  # heads part with different tokens and numbers of tiles
                    tiers = layer.held.tier_map()
                    tiers[0, 0, layer.held.stores[0].live_positions()[0, 0, : SHORT["tile"]]] = -1
                    apply_tier_assignment_per_sequence(cache, 0, tiers)
                logits_.append(llama(step, past_key_values=cache, use_cache=True).logits)
            cache.settle()
            assert not fallbacks.reasons
            assert layer.held.stores[0].lengths.unique().numel() > 1
            found[kind] = torch.cat(logits_, 1).float(), layer.held.statistics()
    ours, theirs = found["triton"][0], found["torch"][0]
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02
    for mine, his in zip(found["triton"][1], found["torch"][1], strict=True):
        torch.testing.assert_close(mine["mass"], his["mass"], rtol=0.05, atol=0.02)
