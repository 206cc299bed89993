"""Perplexity through a cache, measured in decode: a prefill alone would see exact keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade_core.cache.named_caches import CacheFactory, CacheLike, factory_of, opened
from fade_core.support.memory import live_bytes
from fade_eval.decode import feed, prefill
from fade_eval.progress import Progress, Units
from fade_eval.results import EvalResult, mean, standard_error
from fade_eval.tokens import Texts, check_counts, token_rows


@dataclass(frozen=True)
class PerplexityResult(EvalResult):
    """Perplexity of texts' own next tokens.

    Attributes:
        perplexity: ``exp(nll)``.
        nll: mean negative log-likelihood of a token, nats.
        nll_standard_error: standard error of ``nll`` over texts; ``None`` for one text.
        texts: number of texts.
        tokens: tokens that were predicted, all texts together.
        bytes_held: bytes that the cache held at the end of a text, averaged over texts.
        per_text: perplexity of each text.
    """

    perplexity: float
    nll: float
    nll_standard_error: float | None
    texts: int
    tokens: int
    bytes_held: float
    per_text: tuple[float, ...]


def perplexity(
    model: Any,
    texts: Texts = None,
    config: CacheLike = None,
    *,
    tokenizer: Any = None,
    cache_factory: CacheFactory | None = None,
    prompt_tokens: int = 1024,
    steps: int = 128,
    max_texts: int | None = None,
    steps_per_forward: int = 1,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of the ``steps`` tokens that follow a prompt, each predicted through the cache.

    Arguments and errors are those of ``divergence``; ``config="exact"`` measures transformers' own cache.
    """
    check_counts(prompt_tokens=prompt_tokens, steps=steps, steps_per_forward=steps_per_forward)
    factory = cache_factory if cache_factory is not None else factory_of(config)
    rows = token_rows(texts, tokenizer, prompt_tokens + steps + 1, model.device, max_texts)
    advance = Units(len(rows) * steps, progress)
    losses: list[Tensor] = []
    held: list[float] = []
    for row in rows:
        targets, done, parts = row[0, prompt_tokens + 1 :], 0, []
        with opened(factory, model) as cache:
            prefill(model, row[:, :prompt_tokens], cache)
            for logits in feed(model, row[:, prompt_tokens:-1], cache, steps_per_forward):
                wanted = targets[done : done + logits.shape[1], None]
                parts.append(-logits[0].log_softmax(-1).gather(1, wanted).squeeze(1).double().cpu())
                done += logits.shape[1]
                advance(logits.shape[1])
            held.append(live_bytes(cache, exclude=model))
        losses.append(torch.cat(parts))
    every = torch.cat(losses)
    return PerplexityResult(
        perplexity=float(every.mean().exp()),
        nll=float(every.mean()),
        nll_standard_error=standard_error([float(loss.mean()) for loss in losses]),
        texts=len(rows),
        tokens=every.numel(),
        bytes_held=mean(held),
        per_text=tuple(float(loss.mean().exp()) for loss in losses),
    )
