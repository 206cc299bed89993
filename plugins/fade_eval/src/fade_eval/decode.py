"""Running a model through a cache as ``generate()`` does: the prompt at once, then token by token."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fade_core import TieredKVCache
from fade_core.errors import InputError


@torch.no_grad()
def prefill(model: Any, ids: Tensor, cache: Any, chunk: int | None = None) -> Tensor:
    """Feed prompts ``[B, P]`` and return the logits ``[B, V]`` of their last tokens.

    Args:
        model: a causal language model in evaluation mode.
        ids: int64 token ids ``[B, P]``.
        cache: what the model writes its keys and values to.
        chunk: tokens a forward pass; ``None`` for all at once.
    """
    if isinstance(cache, TieredKVCache) and not cache.get_seq_length():
        out = cache.prefill(model, ids, chunk=chunk, **_options(model, 1))
        return _finite(model, out.logits[:, -1:].float(), cache)[:, -1]
    logits = torch.empty(0)
    for part in torch.split(ids, chunk or ids.shape[1], dim=1):
        logits = _forward(model, part, cache, keep=1)
    return logits[:, -1]


@torch.no_grad()
def feed(model: Any, ids: Tensor, cache: Any, tokens_per_forward: int = 1) -> Iterator[Tensor]:
    """Feed ``[B, S]`` through the cache, a few tokens a forward pass; yields the logits ``[B, n, V]`` of each pass."""
    for part in torch.split(ids, tokens_per_forward, dim=1):
        yield _forward(model, part, cache, keep=part.shape[1])


@torch.no_grad()
def greedy(model: Any, first: Tensor, cache: Any, count: int) -> list[int]:
    """Tokens that greedy decoding adds: the argmax of ``first`` ``[V]``, then ``count - 1`` more."""
    tokens = [int(first.argmax())]
    while len(tokens) < count:
        logits = _forward(model, torch.tensor([tokens[-1:]], device=first.device), cache, keep=1)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens


def _forward(model: Any, ids: Tensor, cache: Any, keep: int) -> Tensor:
    """Logits ``[B, keep, V]`` in float32 of the last ``keep`` tokens."""
    out = model(input_ids=ids, past_key_values=cache, use_cache=True, **_options(model, keep))
    return _finite(model, out.logits[:, -keep:].float(), cache)


def _finite(model: Any, logits: Tensor, cache: Any) -> Tensor:
    if not torch.isfinite(logits).all():
        name, length = type(model).__name__, cache.get_seq_length()
        raise InputError(
            f"{name} gave logits that are not finite after {length} tokens; load it in float32 or bfloat16"
        )
    return logits


def _options(model: Any, keep: int) -> dict[str, Any]:
    return {"logits_to_keep": keep} if _keeps_logits(type(model).forward) else {}


@functools.cache
def _keeps_logits(forward: Callable[..., Any]) -> bool:
    return "logits_to_keep" in inspect.signature(forward).parameters
