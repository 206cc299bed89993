"""Models that would go wrong under FADE's attention, found when their cache is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import fresh_seed, tiny_llama
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.llama import modeling_llama

from fade_core import create_tiered_cache
from fade_core.errors import ConfigError, UnsupportedModelError

EXACT: dict[str, Any] = {"n_sink": 4, "recent_window": 16, "tile": 16, "ladder": [{"tier": "fp16"}]}


class Attention(modeling_llama.LlamaAttention):
    """Llama's, its steps apart, so that one can be another."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (p(hidden_states).view(shape).transpose(1, 2) for p in projections)
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        output, found = self.attend(query, key, value, attention_mask, **kwargs)
        return self.o_proj(output.reshape(*hidden_states.shape[:-1], -1)), found

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        attention = modeling_llama.ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, modeling_llama.eager_attention_forward
        )
        return attention(self, query, key, value, mask, dropout=0.0, scaling=self.scaling, **given)


class Rewriting(Attention):
    """Works on values after they are stored, as DiffLlama does."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        return super().attend(query, key, value.flip(1), mask, **given)


class OfItsOwn(Attention):
    """Calls no attention function; the mask is added, as Git does."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        return modeling_llama.eager_attention_forward(self, query, key, value, mask, self.scaling)


class ByName(Attention):
    """Hides some tokens if attention is called "eager" or "sdpa", as MiniMax-M3 does."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        if self.config._attn_implementation in ("eager", "sdpa"):
            mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
            mask[:, 1::3] = False
            mask[-query.shape[2] :, -query.shape[2] :].fill_diagonal_(True)
            mask = torch.where(mask, 0.0, -torch.inf)[None, None].to(query.dtype)
        return super().attend(query, key, value, mask, **given)


class Biased(Attention):
    """Attention is steered by a tensor of the model's."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **given: Any) -> Any:
        bias = torch.arange(key.shape[2]).to(query.dtype)[None, None, None] / 9
        bias = bias.expand(1, query.shape[1], query.shape[2], -1)
        return super().attend(query, key, value, mask, position_bias=bias, **given)


class SaysItIsNotCausal(Attention):
    """Its own attention always has a mask, so nobody minds, as in BigBird-Pegasus."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.is_causal = False


def of(kind: type[Attention], implementation: str = "sdpa") -> Any:
    """A tiny Llama with another attention."""
    model = tiny_llama(fresh_seed(), layers=2).double()
    for index, layer in enumerate(model.model.layers):
        other = kind(model.config, index).double().eval()
        other.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = other
    model.set_attn_implementation(implementation)
    return model


@torch.no_grad()
def answer(model: Any, cache: Any) -> Tensor:
    torch.manual_seed(3)
    ids = torch.randint(1, 255, (1, 90))
    parts = (ids[:, :70], *ids[:, 70:].split(1, 1))
    return torch.cat([model(part, past_key_values=cache).logits[:, -1] for part in parts])


REASONS = {
    Rewriting: r"layer 0 works on keys or values that it has stored \(flip\)",
    OfItsOwn: "layer 0 does not call the attention that its configuration names",
    ByName: "ByName.attend does something of its own where attention is called 'sdpa'",
    Biased: "layer 0 steers attention by position_bias",
}


@pytest.mark.parametrize("kind", REASONS, ids=lambda kind: kind.__name__)
def test_what_fades_attention_would_get_wrong_runs_its_own(kind: type[Attention]) -> None:
    model = of(kind, "eager" if kind is OfItsOwn else "sdpa")
    wanted = answer(model, DynamicCache(config=model.config))
    with create_tiered_cache(model, **EXACT) as cache:
        assert cache.attention == "stock"
        torch.testing.assert_close(answer(model, cache), wanted, rtol=1e-9, atol=1e-9)
    with pytest.raises(ConfigError, match=f"cannot leave evicted tokens out \\(.*{REASONS[kind]}"):
        create_tiered_cache(model, policy={"kind": "h2o", "budget": 0.5})
    with pytest.raises(UnsupportedModelError, match=f"{REASONS[kind]}.*attention = 'auto' or 'stock'"):
        create_tiered_cache(model, attention="fade")


@pytest.mark.parametrize("kind", [Attention, SaysItIsNotCausal], ids=lambda kind: kind.__name__)
def test_what_it_gets_right_runs_it(kind: type[Attention]) -> None:
    model = of(kind, "eager")
    wanted = answer(model, DynamicCache(config=model.config))
    tolerance = 1e-5 * float(wanted.std())  # eager attention has its softmax in float32
    with create_tiered_cache(model, **EXACT, attention="fade") as cache:
        torch.testing.assert_close(answer(model, cache), wanted, rtol=0, atol=tolerance)


def test_a_model_that_wants_a_cache_of_its_own_is_refused() -> None:
    class Own(modeling_llama.LlamaForCausalLM):
        def forward(self, *args: Any, past_key_values: Any = None, **kwargs: Any) -> Any:
            if past_key_values is not None:
                raise ValueError("this model makes its cache itself")
            return super().forward(*args, **kwargs)

    model = Own(tiny_llama(fresh_seed()).config).eval()
    with pytest.raises(UnsupportedModelError, match=r"Own does not work with a cache.*makes its cache itself"):
        create_tiered_cache(model)


def test_the_check_leaves_no_trace() -> None:
    """Neither random numbers nor gradients, modes nor names, in training or not; one pass a model."""
    model = of(Attention)
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    passes: list[int] = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    model.train()
    before = torch.get_rng_state()
    for _ in range(3):
        create_tiered_cache(model, **EXACT).detach()
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and len(passes) == 1
    assert all(p.grad is None for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_only_images_fill_are_left_alone() -> None:
    """As Mllama's cross-attention: a pass of text does not reach them."""
    model = tiny_llama(fresh_seed(), layers=3).double()
    skipped = model.model.layers[1]
    skipped.forward = lambda hidden_states, **_: hidden_states
    wanted = answer(model, DynamicCache(config=model.config))
    with create_tiered_cache(model, **EXACT) as cache:
        assert [layer.index for layer in cache.tiered] == [0, 2]
        torch.testing.assert_close(answer(model, cache), wanted, rtol=1e-9, atol=1e-9)
        assert cache.layers[0].keys.shape == (1, 2, 90, 16)
        assert cache.layers[1].keys is None
