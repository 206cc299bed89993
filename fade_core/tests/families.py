"""Tiny random models of the families whose attention differs, and what tests of caches do with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tiny import VOCABULARY
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


def tiny_qwen3(seed: int = 0, layers: int = 3) -> Qwen3ForCausalLM:
    """Keys and queries normalised a head."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**_SIZES, num_hidden_layers=layers)).eval()


def tiny_gemma2(seed: int = 0, softcap: float = 5.0) -> Gemma2ForCausalLM:
    """Soft-capped logits; sliding layers of 24 tokens between full ones."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        **_SIZES, num_hidden_layers=4, sliding_window=24, query_pre_attn_scalar=16, attn_logit_softcapping=softcap
    )
    return Gemma2ForCausalLM(config).eval()


def tiny_gemma3(seed: int = 0, layers: int = 5) -> Gemma3ForCausalLM:
    """Sliding layers of 24 tokens first and last, full ones at 1 and 3; or the first ``layers`` of these."""
    torch.manual_seed(seed)
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention", "sliding_attention"][:layers]
    config = Gemma3TextConfig(
        **_SIZES, num_hidden_layers=layers, sliding_window=24, query_pre_attn_scalar=16, layer_types=kinds
    )
    return Gemma3ForCausalLM(config).eval()


@torch.no_grad()
def feed(model: Any, ids: Tensor, cache: Any, mask: Tensor | None = None) -> Tensor:
    """One forward pass; logits of the last token, ``[B, V]``."""
    logits: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
    return logits[:, -1]


def greedy(model: Any, logits: Tensor, cache: Any, steps: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``steps`` tokens after ``logits`` ``[B, V]``: the tokens ``[B, steps]`` and the last logits."""
    tokens = []
    for _ in range(steps):
        tokens.append(logits.argmax(-1, keepdim=True))
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], 1)], dim=1)
        logits = feed(model, tokens[-1], cache, mask)
    return torch.cat(tokens, dim=1), logits


def left_padded(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random ids and mask of rows of ``lengths`` tokens, padded on the left."""
    width = max(lengths)
    ids = torch.randint(1, VOCABULARY, (len(lengths), width))
    mask = torch.arange(width) >= width - torch.tensor(lengths)[:, None]
    return ids.masked_fill(~mask, 0), mask.long()


def assert_same_state(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Two answers of ``cache_state_dict``, bit by bit."""
    for index, facts in expected["header"]["layers"].items():
        assert found["header"]["layers"][index] == facts, index
    assert found["header"] == expected["header"]
    assert found["tensors"].keys() == expected["tensors"].keys()
    for name, tensor in expected["tensors"].items():
        assert found["tensors"][name].dtype == tensor.dtype, name
        assert torch.equal(found["tensors"][name], tensor), name


@contextmanager
def spoiled(model: Any, layer: int, side: str, row: int, column: int, value: float) -> Iterator[None]:
    """Inside the block every forward pass has ``value`` among the keys or values of one token of a layer."""
    attention = model.model.layers[layer].self_attn
    target = attention.v_proj if side == "values" else attention.k_proj

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[row, column] = value
        return output

    handle = target.register_forward_hook(spoil)
    try:
        yield
    finally:
        handle.remove()
