"""Tiny random models and tokenizers, and seeds that a failing run prints."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 256


def fresh_seed() -> int:
    """A seed from FADE_SEED or the clock, printed so that a failure can be run again."""
    seed = int(os.environ.get("FADE_SEED", time.time_ns() % 2**31))
    print(f"FADE_SEED={seed}")
    return seed


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
