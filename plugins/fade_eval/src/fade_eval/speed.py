"""Time of a decode step with several caches, measured in turns in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade_core.cache.named_caches import EXACT, CacheFactory, opened
from fade_core.errors import InputError
from fade_core.models.loading import exact_cache
from fade_core.support.memory import live_bytes
from fade_eval.decode import feed, prefill
from fade_eval.progress import Progress, Units
from fade_eval.results import EvalResult
from fade_eval.tokens import check_counts


@dataclass(frozen=True)
class StepTime(EvalResult):
    """Decode steps of one cache.

    Attributes:
        ms: median milliseconds of a step.
        ms_low: lower quartile of the rounds.
        ms_high: upper quartile.
        tokens_per_second: of one row, from the median.
        ratio: median over rounds of this cache's time by the exact cache's time in the same round; below 1 is faster.
        held_bytes: what the cache held at the end.
        tokens: length of the cache at the end.
    """

    ms: float
    ms_low: float
    ms_high: float
    tokens_per_second: float
    ratio: float
    held_bytes: int
    tokens: int


def step_times(
    model: Any,
    ids: Tensor,
    caches: Mapping[str, CacheFactory],
    *,
    rounds: int = 9,
    steps: int = 8,
    warmup: int = 1,
    progress: Progress | None = None,
) -> dict[str, StepTime]:
    """Time single-token steps after a prompt, with transformers' own cache ("exact") and with ``caches``.

    All caches live at once and take turns: ``steps`` steps each a round, in rotating order.

    Args:
        model: a causal language model in evaluation mode.
        ids: int64 ``[1, T]``, the prompt.
        caches: factories by name.
        rounds: turns that count.
        steps: decode steps a turn.
        warmup: turns before, not counted.
        progress: called as turns are done.

    Raises:
        InputError: for numbers below 1, or a cache called "exact".
    """
    check_counts(rounds=rounds, steps=steps)
    if EXACT in caches:
        raise InputError(f"{EXACT!r} is measured anyway; give the other caches other names")
    names = [EXACT, *caches]
    advance = Units(len(names) * (rounds + warmup + 1), progress)
    times: dict[str, list[float]] = {name: [] for name in names}
    with ExitStack() as stack:
        made = {EXACT: stack.enter_context(opened(exact_cache, model))}
        prefill(model, ids, made[EXACT])
        advance(1)
        for name, factory in caches.items():
            made[name] = stack.enter_context(opened(factory, model))
            prefill(model, ids, made[name])
            advance(1)
        token = ids[:, -1:].repeat(1, steps)
        for turn in range(warmup + rounds):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds = _timed(model, token, made[name])
                if turn >= warmup:
                    times[name].append(seconds / steps)
                advance(1)
        return {name: _summary(times[name], times[EXACT], cache, model) for name, cache in made.items()}


def decode_rate(model: Any, cache: Any, steps: int) -> float:
    """Tokens a second of single-token steps on a filled cache, from the median step; the cache grows by ``steps``."""
    check_counts(steps=steps)
    token = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    return 1 / statistics.median(_timed(model, token, cache) for _ in range(steps))


def _timed(model: Any, tokens: Tensor, cache: Any) -> float:
    _finish(model)
    start = time.perf_counter()
    for _ in feed(model, tokens, cache):
        pass
    _finish(model)
    return time.perf_counter() - start


def _finish(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _summary(seconds: list[float], exact: list[float], cache: Any, model: Any) -> StepTime:
    middle = statistics.median(seconds)
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (middle, middle, middle)
    return StepTime(
        ms=middle * 1e3,
        ms_low=low * 1e3,
        ms_high=high * 1e3,
        tokens_per_second=1 / middle,
        ratio=statistics.median(ours / theirs for ours, theirs in zip(seconds, exact, strict=True)),
        held_bytes=live_bytes(cache, exclude=model),
        tokens=cache.get_seq_length(),
    )
