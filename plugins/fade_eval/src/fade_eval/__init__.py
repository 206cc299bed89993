"""Measuring what a cache costs: in decode, on any model, with the bytes really held beside each figure.

Names are imported on first use: that this is installed costs the command line nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fade_eval.haystack import NeedleAnswer, NeedleResult, needle
    from fade_eval.kl import DivergenceResult, ExactRun, TextDivergence, divergence, exact_runs
    from fade_eval.likelihood import PerplexityResult, perplexity
    from fade_eval.results import EvalResult, HeldBytes
    from fade_eval.tasks import EvalOptions, EvalTask

_HOME = {
    **dict.fromkeys(("NeedleAnswer", "NeedleResult", "needle"), "haystack"),
    **dict.fromkeys(("DivergenceResult", "ExactRun", "TextDivergence", "divergence", "exact_runs"), "kl"),
    **dict.fromkeys(("PerplexityResult", "perplexity"), "likelihood"),
    **dict.fromkeys(("EvalResult", "HeldBytes"), "results"),
    **dict.fromkeys(("EvalOptions", "EvalTask"), "tasks"),
}
"""Public name to the module that defines it."""

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


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
