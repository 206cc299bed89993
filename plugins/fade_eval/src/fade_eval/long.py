"""How caches fare along a long answer: teacher-forced, side by side, so that nobody's logits are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fade_core.cache.named_caches import opened
from fade_core.models.loading import exact_cache
from fade_eval.contenders import Contender, excuse
from fade_eval.decode import feed, prefill
from fade_eval.progress import Units

FIRST = 256
"""Steps that the last quarter is compared with."""

TOGETHER = 32
"""Tokens a forward pass."""


@dataclass
class LongRun:
    """Divergence from the exact cache along one answer.

    Attributes:
        parts: KL(exact || cache) in nats, float64, of the steps of each forward pass.
        left_out: why the cache did not get to the end; empty if it did.
    """

    parts: list[Tensor] = field(default_factory=list)
    left_out: str = ""

    @property
    def first(self) -> float:
        """Mean KL of the first 256 steps; NaN without steps."""
        return float(self._steps()[:FIRST].mean())

    @property
    def last(self) -> float:
        """Mean KL of the last quarter of the steps; NaN without steps."""
        steps = self._steps()
        return float(steps[len(steps) - math.ceil(len(steps) / 4) :].mean())

    def _steps(self) -> Tensor:
        return torch.cat(self.parts) if self.parts else torch.empty(0, dtype=torch.float64)


@torch.no_grad()
def long_runs(
    model: Any, ids: Tensor, contenders: Sequence[Contender], prompt_tokens: int, advance: Units
) -> dict[str, LongRun]:
    """Feed one text to the exact cache and to every other, ``TOGETHER`` tokens at a time; a run for each contender's name.

    Args:
        model: a causal language model in evaluation mode.
        ids: int64 ``[1, T]``.
        contenders: what to compare; their caches live side by side.
        prompt_tokens: tokens fed at once before the steps.
        advance: called with the steps done.

    Raises:
        Exception: what a contender raises, where ``excuse`` does not leave it out.
    """
    runs = {contender.name: LongRun() for contender in contenders}
    caches: dict[str, Any] = {}
    with ExitStack() as stack:
        exact = stack.enter_context(opened(exact_cache, model))
        prefill(model, ids[:, :prompt_tokens], exact)
        for part in ids[:, prompt_tokens:].split(TOGETHER, 1):
            wanted = _log_probabilities(model, part, exact)
            for contender in contenders:
                run = runs[contender.name]
                if run.left_out:
                    continue
                try:
                    if contender.name not in caches:
                        caches[contender.name] = stack.enter_context(opened(contender.factory, model))
                        prefill(model, ids[:, :prompt_tokens], caches[contender.name])
                    found = _log_probabilities(model, part, caches[contender.name])
                except Exception as error:  # noqa: BLE001 (excuse raises what may not be left out)
                    run.left_out = excuse(contender, error)
                    continue
                kl = (wanted.exp() * (wanted - found)).sum(-1, dtype=torch.float64)
                run.parts.append(kl.clamp(min=0).cpu())
            advance(part.shape[1] * (1 + len(contenders)))
    return runs


def _log_probabilities(model: Any, part: Tensor, cache: Any) -> Tensor:
    """Of the token after each of ``part`` ``[1, S]``, float32 ``[S, V]``."""
    (logits,) = feed(model, part, cache, part.shape[1])
    return logits[0].log_softmax(-1)
