"""Tiny random models of many families, in float64 so that two ways to compute one thing agree to the last token."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
"""Large weights: attention is sharp and the logits lie far apart."""


def fresh_seed() -> int:
    """A seed from FADE_SEED or the clock, printed so that a failure can be run again."""
    seed = int(os.environ.get("FADE_SEED", time.time_ns() % 2**31))
    print(f"FADE_SEED={seed}")
    return seed


def by_turns(length: int, *axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Every combination of ``axes``, ending in ``max_cache_len``: ``None`` and ``length`` by turns.

    Each value of an axis meets both, where another axis has two values or more.
    """
    numbered = itertools.product(*(list(enumerate(axis)) for axis in axes))
    return [(*(v for _, v in case), (None, length)[sum(number for number, _ in case) % 2]) for case in numbered]


def tiny(model_type: str, seed: int, dtype: torch.dtype = torch.float64, **fields: Any) -> PreTrainedModel:
    """A random model of ``model_type`` (transformers' own name) that generates without an end token.

    ``fields`` go to its config beside small sizes; ``...`` takes one of those back.
    """
    torch.manual_seed(seed)
    wanted = {name: value for name, value in (_COMMON | fields).items() if value is not ...}
    config = CONFIG_MAPPING[model_type](**wanted)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, experts_implementation="eager")
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def prompt(seed: int, length: int, rows: int = 1) -> Tensor:
    """Random token ids ``[rows, length]`` that repeat themselves here and there; 0 (padding) does not occur."""
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (rows, length), generator=random)
    phrase = 12
    for start in range(2 * phrase, length - phrase, 3 * phrase):
        ids[:, start : start + phrase] = ids[:, :phrase]
    return ids


def left_padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """Rows ``[T_i]`` as one batch: ``input_ids`` and ``attention_mask``, padded on the left with 0."""
    width = max(len(row) for row in rows)
    ids = torch.stack([torch.nn.functional.pad(row, (width - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (width - len(row), 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}
