"""A tiny model run densely, and the same text through a cache whose policy is listened to.

The dense run keeps queries, keys, values and attention probabilities of every layer, computed by a plain masked
softmax; policies are then written out from these, and compared with what they scored inside the cache.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from fade_core import EvictionPolicy, FadeConfig, LayerView, create_tiered_cache

LAYERS, HEADS, KV_HEADS, DIM = 2, 4, 2, 16


def tiny_model(seed: int) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=HEADS * DIM,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        initializer_range=0.2,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).double().eval()


@dataclass(frozen=True)
class Dense:
    """One layer of the dense run, float64.

    Attributes:
        queries: ``[B, H_q, T, D]`` after RoPE, times the softmax scale.
        keys: ``[B, H_kv, T, D]`` after RoPE.
        values: ``[B, H_kv, T, D]``.
        attention: ``[B, H_q, T, T]``.
        real: bool ``[B, T]``, false for padding.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    attention: Tensor
    real: Tensor

    def of_group(self) -> Tensor:
        """Attention averaged over the query heads of a KV head, ``[B, H_kv, T, T]``."""
        return self.attention.unflatten(1, (self.keys.shape[1], -1)).mean(2)


def dense_run(model: Any, ids: Tensor, mask: Tensor) -> list[Dense]:
    """Every layer of one forward pass of ``ids`` ``[B, T]``."""
    found: list[Dense] = []

    def listening(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
        seen = torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask.bool()[:, None, None]
        logits = query * scaling @ key.repeat_interleave(groups, 1).mT
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
        found.append(Dense(query * scaling, key, value, weights, mask.bool()))
        return (weights @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None

    AttentionInterface.register("listening", listening)
    AttentionMaskInterface.register("listening", sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation("listening")
    try:
        with torch.no_grad():
            model(ids, attention_mask=mask, use_cache=False)
    finally:
        model.set_attn_implementation(before)
    return found


@dataclass(frozen=True)
class Heard:
    """What a policy scored once."""

    layer: int
    length: int
    positions: Tensor
    scores: Tensor

    def by_position(self, like: Tensor) -> Tensor:
        """Scores ``[B, H_kv, T]`` at their positions, those of ``like`` where no token is."""
        found = like.clone()
        row, head, slot = (self.positions >= 0).nonzero(as_tuple=True)
        found[row, head, self.positions[row, head, slot]] = self.scores[row, head, slot].to(like.dtype)
        return found


class Listening(EvictionPolicy):
    """Another policy, all of whose scores are kept."""

    kind = "listening"

    def __init__(self, policy: EvictionPolicy) -> None:
        self.policy = policy
        self.heard: list[Heard] = []

    def score(self, view: LayerView) -> Tensor:
        scores = self.policy.score(view)
        self.heard.append(Heard(view.layer, view.logical_length, view.positions.clone(), scores.clone()))
        return scores


def heard_run(
    model: Any, ids: Tensor, mask: Tensor, policy: dict[str, Any], prompt: int, step: int = 1, **fields: Any
) -> tuple[Any, list[Heard]]:
    """Feed ``ids`` to an exact cache that evicts: the prompt at once, then ``step`` tokens a pass. All that was scored."""
    config = FadeConfig(n_sink=2, recent_window=16, tile=16, ladder=[{"tier": "fp16"}], policy=policy, **fields)
    with create_tiered_cache(model, config=config) as cache, torch.no_grad():
        listening = Listening(cache.tiered[0].plan.policy)
        for layer in cache.tiered:
            layer.plan.policy = listening
        cuts = [0, *range(prompt, ids.shape[1], step), ids.shape[1]]
        for start, end in itertools.pairwise(cuts):
            model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
        return cache, listening.heard


def left_padded(lengths: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random rows of these lengths, padded on the left with 0, and their mask."""
    width = max(lengths)
    ids = torch.randint(1, 96, (len(lengths), width), generator=generator)
    mask = torch.stack([torch.arange(width) >= width - length for length in lengths]).long()
    return ids * mask, mask
