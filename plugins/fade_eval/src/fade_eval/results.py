"""What evaluations return: frozen figures that turn into plain dictionaries."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EvalResult:
    """Base of every result."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold, nested results included."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class HeldBytes(EvalResult):
    """Bytes that caches held at the end of a run, averaged over texts (storages reachable from the cache, each once).

    Attributes:
        cache: bytes of the cache that was measured.
        exact: bytes of transformers' own cache after the same tokens, in the model's dtype.
        exact_16bit: the same with two bytes a number, whatever the model's dtype.
        ratio: ``cache / exact``.
        ratio_16bit: ``cache / exact_16bit``.
    """

    cache: float
    exact: float
    exact_16bit: float
    ratio: float
    ratio_16bit: float

    @classmethod
    def of(cls, cache: float, exact: float, itemsize: int) -> HeldBytes:
        """From bytes held, and bytes of the exact cache whose numbers take ``itemsize`` bytes."""
        narrow = exact * 2 / itemsize
        return cls(cache, exact, narrow, cache / exact if exact else math.nan, cache / narrow if narrow else math.nan)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, NaN of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean over texts; ``None`` for fewer than two."""
    if len(values) < 2:
        return None
    centre = mean(values)
    variance = math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(variance / len(values))
