"""Both Triton kernels under a cache of fixed size: steps take tokens in and read them by what lies on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import seed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fade_core import FadeConfig, create_tiered_cache

SHORT: dict[str, Any] = {"n_sink": 4, "recent_window": 16, "tile": 64}


def model(device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, head_dim=64,
        num_key_value_heads=2, initializer_range=0.1, pad_token_id=0, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(device, torch.bfloat16)


@torch.no_grad()
def logits(
    llama: LlamaForCausalLM, config: FadeConfig, ids: Tensor, steps: Tensor, compiled: bool
) -> tuple[Tensor, Any]:
    mask = torch.ones_like(ids)
    mask[1, :2] = 0  # padding
    with create_tiered_cache(llama, config, max_cache_len=256) as cache:
        llama(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        forward = torch.compile(llama, backend="eager", fullgraph=True) if compiled else llama
        found = []
        for step in steps.split(1, 1):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            slots = cache.tiered[0].slots
            seen = torch.nn.functional.pad(mask.bool(), (0, slots - mask.shape[1]))[:, None, None].contiguous()
            places = mask.sum(1, keepdim=True) - 1
            found.append(
                forward(step, attention_mask=seen, position_ids=places, past_key_values=cache, use_cache=True).logits
            )
        layer = cache.tiered[0]
        assert (layer.step_plan.append.name, layer.step_plan.attention.name) == (config.kernel.kind,) * 2
        assert not layer.step_plan.refused
        layer.settle()
        return torch.cat(found, 1).float(), (layer.stores[0].per_head[:, 0].tolist(), layer.stores[0].packed_keys())


@pytest.mark.slow
@pytest.mark.parametrize(("axis", "compiled"), [("channel", True), ("token", False)])
def test_steps_by_the_kernels_are_steps_by_torch(axis: str, compiled: bool, device: str) -> None:
    number = seed()
    torch._dynamo.reset()
    llama = model(device)
    random = torch.Generator().manual_seed(number)
    ids, steps = (torch.randint(1, 64, (2, n), generator=random).to(device) for n in (81, 7))
    found = {}
    for kind in ("torch", "triton"):
        config = FadeConfig(
            **SHORT, keys={"kind": "uniform", "axis": axis}, kernel={"kind": kind, "attention_mass": "torch"}
        )
        found[kind] = logits(llama, config, ids, steps, compiled and kind == "triton")
    ours, theirs = found["triton"][0], found["torch"][0]
    assert found["triton"][1][0] == found["torch"][1][0] == [1, 1]  # a row's tile went in a step
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02
    mine, his = found["triton"][1][1].fields, found["torch"][1][1].fields
    assert torch.equal(mine["codes4"][:1], his["codes4"][:1])
    torch._dynamo.reset()


@pytest.mark.slow
def test_steps_evict_by_the_kernels_as_by_torch(device: str) -> None:
    """Heads keep tokens of their own: the kernels read each head's number of tiles, and the mass of what it holds."""
    number = seed()
    torch._dynamo.reset()
    llama = model(device)
    random = torch.Generator().manual_seed(number)
    ids, steps = (torch.randint(1, 64, (2, n), generator=random).to(device) for n in (270, 7))
    found = {}
    for kind in ("torch", "triton"):
        config = FadeConfig(
            **SHORT,
            keys={"kind": "uniform", "axis": "token"},
            policy={"kind": "h2o", "budget": 180, "every": 4},
            kernel={"kind": kind},
        )
        with create_tiered_cache(llama, config, max_cache_len=512) as cache, torch.no_grad():
            llama(ids, past_key_values=cache, use_cache=True)
            layer, logits_ = cache.tiered[0], []
            assert layer.step_plan.mass.name == kind
            for i, step in enumerate(steps.split(1, 1)):
                if i == 3:  # heads part with different tokens and numbers of tiles
                    layer.stores[0].split(_some_tiles(layer), decode=False)
                    layer._publish()
                logits_.append(llama(step, past_key_values=cache, use_cache=True).logits)
            assert not layer.step_plan.refused
            assert layer.stores[0].per_head.unique().numel() > 1
            layer.settle()
            found[kind] = torch.cat(logits_, 1).float(), layer.statistics()
    ours, theirs = found["triton"][0], found["torch"][0]
    assert float((ours - theirs).norm() / theirs.norm()) < 0.02
    for mine, his in zip(found["triton"][1], found["torch"][1], strict=True):
        torch.testing.assert_close(mine["mass"], his["mass"], rtol=0.05, atol=0.02)
    torch._dynamo.reset()


def _some_tiles(layer: Any) -> Tensor:
    """One tile of the first row's first head."""
    store = layer.stores[0]
    moving = torch.zeros_like(store.positions(), dtype=torch.bool)
    moving[0, 0, : store.tile] = True
    return moving
