"""How far a cache moves a model's next-token distributions from those of the exact cache, measured in decode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade_core.cache.named_caches import CacheFactory, CacheLike, factory_of, opened
from fade_core.models.loading import exact_cache
from fade_core.support.memory import live_bytes
from fade_eval.decode import feed, prefill
from fade_eval.progress import Progress, Units
from fade_eval.results import EvalResult, HeldBytes, mean, standard_error
from fade_eval.tokens import Texts, check_counts, token_rows


@dataclass(frozen=True)
class ExactRun:
    """Texts of one length decoded side by side with the exact cache: what others are compared with.

    Attributes:
        ids: int64 ``[B, T]``, a text a row.
        prompt_tokens: tokens ``P`` of each that went in at once; all others but the last went in one by one.
        logits: float32 ``[B, T - P - 1, V]`` after each of those.
        bytes_held: bytes of the exact cache at the end, all rows together.
    """

    ids: Tensor
    prompt_tokens: int
    logits: Tensor
    bytes_held: int


@dataclass(frozen=True)
class TextDivergence(EvalResult):
    """Figures of one text; the fields are those of ``DivergenceResult``."""

    steps: int
    kl_mean: float
    kl_max: float
    top1_agreement: float
    perplexity: float
    exact_perplexity: float
    held: HeldBytes


@dataclass(frozen=True)
class DivergenceResult(EvalResult):
    """Divergence of a cache from the exact one, over all steps of all texts.

    Attributes:
        texts: number of texts.
        prompt_tokens: tokens fed at once before the steps.
        steps: teacher-forced steps a text.
        kl_mean: mean of KL(exact || cache) of the next-token distributions, nats.
        kl_standard_error: standard error of ``kl_mean`` over texts; ``None`` for one text.
        kl_p99: 99th percentile over steps.
        kl_max: largest over steps.
        top1_agreement: share of steps whose most likely token is the same.
        top1_standard_error: as for ``kl_mean``.
        perplexity: of the texts' own next tokens, through the cache.
        exact_perplexity: the same through the exact cache.
        perplexity_change: ``perplexity / exact_perplexity - 1``.
        held: what the caches held at the end of the texts.
        per_text: figures of each text.
    """

    texts: int
    prompt_tokens: int
    steps: int
    kl_mean: float
    kl_standard_error: float | None
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top1_standard_error: float | None
    perplexity: float
    exact_perplexity: float
    perplexity_change: float
    held: HeldBytes
    per_text: tuple[TextDivergence, ...]


@dataclass(frozen=True)
class Steps:
    """Raw figures of every step of one text, from which the results are made.

    Attributes:
        kl: float64 ``[S]``, nats.
        same: bool ``[S]``, whether the most likely token is the same.
        nll: float64 ``[S']`` of the text's own next tokens through the cache.
        exact_nll: the same through the exact cache.
        held: what the caches held at the end.
    """

    kl: Tensor
    same: Tensor
    nll: Tensor
    exact_nll: Tensor
    held: HeldBytes


def divergence(
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
    batch_size: int = 1,
    exact: Sequence[ExactRun] | None = None,
    progress: Progress | None = None,
) -> DivergenceResult:
    """Compare a cache with transformers' own, teacher-forced: the prompt at once, then every token through the cache.

    Args:
        model: a causal language model in evaluation mode.
        texts: one or several, as strings or token ids; ``None`` for the shipped evaluation texts.
        config: a configuration, a preset's name, a configuration file or a factory; ``None`` for the default.
        tokenizer: needed if the texts are strings.
        cache_factory: makes the cache to measure, instead of ``config``.
        prompt_tokens: tokens fed at once (the exact keys and values are seen there by definition).
        steps: tokens fed one by one after it, which are what is measured.
        max_texts: take only so many texts.
        steps_per_forward: tokens a forward pass after the prompt; more than 1 is faster and reads the cache as
            chunked prefill does.
        batch_size: texts decoded side by side: faster, and the same to within the model's own rounding.
        exact: runs with the exact cache of the same texts, to measure several caches against them (``exact_runs``).
        progress: called as steps are done.

    Raises:
        InputError: if a text is too short or a number does not make sense.
        ConfigError: if ``config`` means no cache.
    """
    check_counts(prompt_tokens=prompt_tokens, steps=steps, steps_per_forward=steps_per_forward, batch_size=batch_size)
    factory = cache_factory if cache_factory is not None else factory_of(config)
    if exact is None:
        batches = text_batches(texts, tokenizer, prompt_tokens + steps + 1, model.device, max_texts, batch_size)
    else:
        batches = [run.ids for run in exact]
    advance = Units(sum(map(len, batches)) * steps * (1 if exact is not None else 2), progress)
    measured: list[Steps] = []
    for number, ids in enumerate(batches):
        run = (
            exact[number]
            if exact is not None
            else run_exact(model, ids, prompt_tokens, steps_per_forward=steps_per_forward, advance=advance)
        )
        measured += compare(model, factory, run, steps_per_forward=steps_per_forward, advance=advance)
    return summarise(measured, prompt_tokens, steps)


def text_batches(
    texts: Texts, tokenizer: Any, needed: int, device: torch.device, limit: int | None, batch_size: int
) -> list[Tensor]:
    """Texts of ``needed`` tokens as int64 ids ``[B <= batch_size, needed]``. Arguments and errors as ``token_rows``."""
    rows = token_rows(texts, tokenizer, needed, device, limit)
    return [torch.cat(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def exact_runs(
    model: Any,
    texts: Texts = None,
    *,
    tokenizer: Any = None,
    prompt_tokens: int = 1024,
    steps: int = 128,
    max_texts: int | None = None,
    steps_per_forward: int = 1,
    batch_size: int = 1,
) -> list[ExactRun]:
    """Runs with the exact cache, for ``divergence(exact=...)``. Arguments and errors as there.

    A run holds its logits: ``steps * vocabulary * 4`` bytes a text.
    """
    check_counts(prompt_tokens=prompt_tokens, steps=steps, steps_per_forward=steps_per_forward, batch_size=batch_size)
    batches = text_batches(texts, tokenizer, prompt_tokens + steps + 1, model.device, max_texts, batch_size)
    return [run_exact(model, ids, prompt_tokens, steps_per_forward=steps_per_forward) for ids in batches]


def run_exact(
    model: Any,
    ids: Tensor,
    prompt_tokens: int,
    *,
    steps_per_forward: int = 1,
    advance: Callable[[int], None] | None = None,
) -> ExactRun:
    """Decode texts ``[B, T]`` with the exact cache. Their last tokens are only predicted, never fed.

    Args:
        model: a causal language model in evaluation mode.
        ids: int64 ``[B, T]``.
        prompt_tokens: tokens fed at once.
        steps_per_forward: tokens a forward pass after the prompt.
        advance: called with the tokens of each forward pass, all rows together.
    """
    with opened(exact_cache, model) as cache:
        prefill(model, ids[:, :prompt_tokens], cache)
        return follow_exact(model, cache, ids, prompt_tokens, steps_per_forward=steps_per_forward, advance=advance)


def follow_exact(
    model: Any,
    cache: Any,
    ids: Tensor,
    prompt_tokens: int,
    *,
    steps_per_forward: int = 1,
    advance: Callable[[int], None] | None = None,
) -> ExactRun:
    """As ``run_exact``, on an exact cache that holds the first ``prompt_tokens`` tokens already."""
    logits = []
    for step in feed(model, ids[:, prompt_tokens:-1], cache, steps_per_forward):
        logits.append(step)
        if advance is not None:
            advance(step.shape[0] * step.shape[1])
    return ExactRun(ids, prompt_tokens, torch.cat(logits, dim=1), live_bytes(cache, exclude=model))


def compare(
    model: Any,
    factory: CacheFactory,
    run: ExactRun,
    *,
    steps_per_forward: int = 1,
    advance: Callable[[int], None] | None = None,
) -> list[Steps]:
    """Decode the same texts with another cache and compare step by step; no logits are kept. Arguments as above."""
    with opened(factory, model) as cache:
        prefill(model, run.ids[:, : run.prompt_tokens], cache)
        return follow(model, cache, run, steps_per_forward=steps_per_forward, advance=advance)


def follow(
    model: Any,
    cache: Any,
    run: ExactRun,
    *,
    steps_per_forward: int = 1,
    advance: Callable[[int], None] | None = None,
) -> list[Steps]:
    """As ``compare``, on a cache that holds the run's prompt already."""
    figures: list[tuple[Tensor, ...]] = []
    done = 0
    for logits in feed(model, run.ids[:, run.prompt_tokens : -1], cache, steps_per_forward):
        here = slice(done, done + logits.shape[1])
        next_tokens = run.ids[:, run.prompt_tokens + 1 :][:, here, None]
        wanted, found = run.logits[:, here].log_softmax(-1), logits.log_softmax(-1)
        figures.append(
            (
                (wanted.exp() * (wanted - found)).sum(-1, dtype=torch.float64).clamp(min=0).cpu(),
                (wanted.argmax(-1) == found.argmax(-1)).cpu(),
                -found.gather(2, next_tokens).squeeze(2).double().cpu(),
                -wanted.gather(2, next_tokens).squeeze(2).double().cpu(),
            )
        )
        done = here.stop
        if advance is not None:
            advance(logits.shape[0] * logits.shape[1])
    rows = run.ids.shape[0]
    held, exact = live_bytes(cache, exclude=model) / rows, run.bytes_held / rows
    sizes = HeldBytes.of(held, exact, model.dtype.itemsize)
    kl, same, nll, exact_nll = (torch.cat(parts, dim=1) for parts in zip(*figures, strict=True))
    return [Steps(kl[row], same[row], nll[row], exact_nll[row], sizes) for row in range(rows)]


def summarise(measured: Sequence[Steps], prompt_tokens: int, steps: int) -> DivergenceResult:
    """One result from the steps of all texts."""
    per_text = tuple(_of_text(text) for text in measured)
    kl, same = torch.cat([text.kl for text in measured]), torch.cat([text.same for text in measured])
    perplexity = float(torch.cat([text.nll for text in measured]).mean().exp())
    exact_perplexity = float(torch.cat([text.exact_nll for text in measured]).mean().exp())
    exact = mean([text.held.exact for text in measured])
    itemsize = round(2 * exact / mean([text.held.exact_16bit for text in measured]))
    return DivergenceResult(
        texts=len(measured),
        prompt_tokens=prompt_tokens,
        steps=steps,
        kl_mean=float(kl.mean()),
        kl_standard_error=standard_error([text.kl_mean for text in per_text]),
        kl_p99=float(kl.quantile(0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(same.double().mean()),
        top1_standard_error=standard_error([text.top1_agreement for text in per_text]),
        perplexity=perplexity,
        exact_perplexity=exact_perplexity,
        perplexity_change=perplexity / exact_perplexity - 1,
        held=HeldBytes.of(mean([text.held.cache for text in measured]), exact, itemsize),
        per_text=per_text,
    )


def _of_text(text: Steps) -> TextDivergence:
    return TextDivergence(
        steps=text.kl.numel(),
        kl_mean=float(text.kl.mean()),
        kl_max=float(text.kl.max()),
        top1_agreement=float(text.same.double().mean()),
        perplexity=float(text.nll.mean().exp()),
        exact_perplexity=float(text.exact_nll.mean().exp()),
        held=text.held,
    )
