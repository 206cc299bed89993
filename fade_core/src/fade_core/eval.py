"""``fade_eval`` under the core's name: ``from fade_core.eval import perplexity, needle, divergence``, looked up when asked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fade_core.errors import MissingDistributionError

if TYPE_CHECKING:
    from fade_eval import divergence, exact_runs, needle, perplexity

__all__ = ["divergence", "exact_runs", "needle", "perplexity"]


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        fade_eval = importlib.import_module("fade_eval")
    except ModuleNotFoundError as error:
        if error.name != "fade_eval":  # it is installed, and something that it needs is not
            raise
        raise MissingDistributionError(f"{__name__}.{name} comes with fade-eval: pip install fade-eval") from error
    return getattr(fade_eval, name)
