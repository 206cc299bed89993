"""How many rows of a context fit in memory, beside the model, while ``generate`` decodes: StaticCache against FADE's cache.

The caches are filled with random tokens layer by layer, so that no prompt's activations decide, and then decode a few
steps, compiled on a GPU. What counts is the most that was alive in those steps, weights included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache
from transformers.cache_utils import Cache

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.errors import InputError
from fade_core.support.memory import PeakTracker, live_bytes
from fade_eval.generating import FIXED, STATIC, compile_config
from fade_eval.progress import Progress, Units
from fade_eval.results import EvalResult
from fade_eval.tokens import check_counts

CHUNK = 1024
"""Tokens that a layer is filled with at once."""

TRIES = 6
"""Batches that are tried, a cache; each may be compiled for anew."""


@dataclass(frozen=True)
class Batch(EvalResult):
    """The largest batch that fits with one cache.

    Attributes:
        cache: which.
        rows: of the batch; 0 if not one fits.
        bytes: most that was alive in a step: weights, cache and what the step needs.
        held_bytes: of that, the cache.
        row_bytes: what a further row takes of the cache.
    """

    cache: str
    rows: int
    bytes: int
    held_bytes: int
    row_bytes: int


@torch.no_grad()
def largest_batches(
    model: Any,
    config: FadeConfig,
    *,
    context: int,
    limit: int,
    steps: int = 4,
    progress: Progress | None = None,
) -> list[Batch]:
    """The most rows that decode within ``limit`` bytes, with StaticCache and with FADE's compiled cache.

    Args:
        model: a causal language model in evaluation mode, full attention in every layer.
        config: FADE's; it has to be one that compiles (``TieredKVCache.compile_refusal``).
        context: tokens a row at the end, the steps' included.
        limit: bytes on the model's device.
        steps: that are decoded.
        progress: called as batches are tried.

    Raises:
        InputError: for numbers below 1, a context that has no prompt, a model with other layers than such of full attention,
            or a configuration that does not compile.
    """
    check_counts(context=context, limit=limit, steps=steps)
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise InputError(
            f"{', '.join(sorted(kinds))} holds no whole context, so that rows cannot be counted by what one layer takes; give "
            f"a model whose layers all have full attention"
        )
    if context < steps + 2:
        raise InputError(f"context={context} holds no prompt before {steps} steps; take at least {steps + 2}")
    runs = _Runs(model, config, context, steps)
    advance = Units(2 * TRIES, progress)
    return [runs.largest(name, limit, advance) for name in (STATIC, FIXED)]


class _Runs:
    """Batches on one model; arguments as ``largest_batches``."""

    def __init__(self, model: Any, config: FadeConfig, context: int, steps: int) -> None:
        self.model, self.config, self.context, self.steps = model, config, context, steps
        self.device = model.device
        self.weights = live_bytes(model)

    def largest(self, name: str, limit: int, advance: Units) -> Batch:
        """Guess from what two small caches hold, try, and correct by what was found."""
        one, two = (self._held(name, rows) for rows in (1, 2))
        row = two - one
        rows = max(1, (limit - self.weights - (one - row)) // row)
        shown = name.partition(",")[0]
        tried, best = set[int](), Batch(shown, 0, 0, 0, row)
        for _ in range(TRIES):
            total, held = self._decoded(name, rows, limit)
            tried.add(rows)
            advance(1)
            if total is not None and total <= limit:
                best = Batch(shown, rows, total, held, row) if rows > best.rows else best
                if limit - total < row:  # what a further row takes of the cache alone
                    break
                rows += max(1, (limit - total) // max(row, (total - self.weights) // rows))
            else:
                over = total - limit if total is not None else row
                rows -= min(rows, math.ceil(over / row))
            if rows in tried or rows < 1 or (best.rows and rows <= best.rows):
                break
        advance(TRIES - len(tried))
        return best

    def _held(self, name: str, rows: int) -> int:
        """Bytes of an empty cache's buffers."""
        with _Made(self, name, rows) as cache:
            cache.update(*self._tokens(rows, 1), 0)  # allocates one layer
            held = live_bytes(cache)
        return held * len(cache.layers)

    def _tokens(self, rows: int, count: int) -> tuple[Tensor, Tensor]:
        config = self.model.config.get_text_config()
        shape = rows, config.num_key_value_heads, count, config.head_dim
        keys, values = (torch.randn(shape, dtype=self.model.dtype, device=self.device) for _ in range(2))
        return keys, values

    def _decoded(self, name: str, rows: int, limit: int) -> tuple[int | None, int]:
        """Most bytes alive in the steps of ``rows`` rows, and the cache's; ``None`` if they did not fit the device.

        No step is taken where cache and weights alone pass ``limit``.
        """
        try:
            with _Made(self, name, rows) as cache:
                prompt = self.context - self.steps - 1
                for layer in range(len(cache.layers)):
                    for start in range(0, prompt, CHUNK):
                        cache.update(*self._tokens(rows, min(CHUNK, prompt - start)), layer)
                        if isinstance(cache, TieredKVCache):
                            cache.tiered[layer].settle()
                held = live_bytes(cache)
                if self.weights + held > limit:
                    return self.weights + held, held
                gpu = self.device.type == "cuda"  # elsewhere what watches the memory does not see through compiled code
                how = {"compile_config": compile_config(self.device)} if gpu else {"disable_compile": True}
                ids = torch.ones((rows, prompt + 1), dtype=torch.long, device=self.device)
                with PeakTracker(self.device) as tracker:
                    self.model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        past_key_values=cache,
                        max_new_tokens=self.steps,
                        do_sample=False,
                        **how,
                    )
                return self.weights + held + tracker.peak, held
        except torch.OutOfMemoryError:
            return None, 0


class _Made:
    """A cache for ``rows`` rows that is let go of at the end, and what was compiled for it."""

    def __init__(self, runs: _Runs, name: str, rows: int) -> None:
        self.runs, self.name, self.rows = runs, name, rows

    def __enter__(self) -> Cache:
        runs = self.runs
        torch._dynamo.reset()
        if self.name == STATIC:
            self.cache: Cache = StaticCache(config=runs.model.config, max_cache_len=runs.context)
            return self.cache
        fixed = create_tiered_cache(runs.model, runs.config, max_cache_len=runs.context)
        self.cache = fixed
        if not fixed.is_compileable:
            fixed.detach()
            raise InputError(f"this cache cannot be compiled: {fixed.compile_refusal}")
        return fixed

    def __exit__(self, *_: object) -> None:
        if isinstance(self.cache, TieredKVCache):
            self.cache.detach()
        del self.cache
        torch._dynamo.reset()
        if self.runs.device.type == "cuda":
            torch.cuda.empty_cache()
