"""Measuring what a cache costs: in decode, on any model, with the bytes really held beside each figure."""

from __future__ import annotations

from fade_core.eval.haystack import NeedleAnswer, NeedleResult, needle
from fade_core.eval.kl import DivergenceResult, ExactRun, TextDivergence, divergence, exact_runs
from fade_core.eval.likelihood import PerplexityResult, perplexity
from fade_core.eval.results import EvalResult, HeldBytes
from fade_core.eval.tasks import EvalOptions, EvalTask

__all__ = [
    "DivergenceResult",
    "EvalOptions",
    "EvalResult",
    "EvalTask",
    "ExactRun",
    "HeldBytes",
    "NeedleAnswer",
    "NeedleResult",
    "PerplexityResult",
    "TextDivergence",
    "divergence",
    "exact_runs",
    "needle",
    "perplexity",
]
