"""Tiny random models and tokenizers, and seeds that a failing run prints."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fade_core.cache.prompt import keep
from fade_core.ops.buffers import AppendRule, layer_buffers
from fade_core.ops.reference import append
from fade_core.storage.tier_store import Tokens
from fade_core.storage.window import Window

VOCABULARY = 256


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


def tiny_llama(seed: int = 0, *, layers: int = 3, vocabulary: int = VOCABULARY) -> LlamaForCausalLM:
    """A random Llama of 4 query heads, 2 KV heads and 16 channels, with sharp enough attention to tell caches apart."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A model and a tokenizer as ``from_pretrained`` reads them."""
    tiny_llama(seed).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def give(window: Window, keys: Tensor, values: Tensor, position: int) -> None:
    """New tokens ``[B, H_kv, Q, D]`` for a window, as a step brings them."""
    window.reserve(window.longest + keys.shape[2])
    buffers = layer_buffers(window, [], torch.tensor([position, 0, 0]), None, False)
    append(keys, values, buffers.step, AppendRule(None, 0, 1 << 30))
    window.numbers.publish()


def take_out(window: Window, start: int, counts: Tensor) -> None:
    """Some tokens of each row leave a window from slot ``start`` on, as those do that are packed."""
    lengths = window.lengths[:, None].expand(-1, window.keys.shape[1])
    run = Tokens(window.decode(0), window.decode(1), window.live_positions(), lengths, window.statistics)
    keep(window, run, counts, start)
