"""What attention tells about tokens: the statistics that eviction policies read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core.errors import ConfigError

STATISTICS = ("mass", "seen", "ema", "last", "window", "reread")
"""Of each token. ``mass``: attention received so far. ``seen``: queries that could attend. ``ema``: decayed mass. ``last``:
the newest query's. ``window``: that of the latest queries, as many as the observation window has. ``reread``: the most that
one query of one head gave while the cache was only read (``TieredKVCache.reading``), 0 for tokens that came later."""

QUERY_STATISTICS = ("query_mean", "query_covariance")
"""Of each layer's latest queries, after RoPE and times the softmax scale (``fade_core.eviction.query_moments``)."""


@dataclass(frozen=True)
class Observation:
    """What becomes of tokens' statistics as queries are observed, for kernels that see to it (``Kernel.observes``).

    Attributes:
        held: statistic name to float32 ``[B, H_kv, T]``, to be updated in place as ``AttentionTracker.observe`` does.
        decay: factor of ``ema`` a query.
        keeps: what all the queries leave of ``window``, to be applied before they are added.
        observed: how many of the last queries count for ``window``.
    """

    held: dict[str, Tensor]
    decay: float
    keeps: float
    observed: int


class AttentionTracker:
    """Turns attention probabilities into per-token statistics, in place.

    One tracker serves a whole cache; the statistics themselves live beside the tokens and move with them. Probabilities
    are averaged over the query heads of a KV head, so that one query gives a head's tokens a mass of one in all.

    Args:
        statistics: which of ``STATISTICS`` and ``QUERY_STATISTICS`` to keep.
        decay: factor of ``ema`` a query.
        observation_window: queries at the end of a prefill (or chunk of one) that are observed; "all" for every one.

    Attributes:
        statistics: those that are kept of each token.
        query_statistics: those that are kept of each layer's queries.
        active: whether anything is tracked of the tokens at every step, so that attention probabilities are needed.
    """

    def __init__(
        self, statistics: Iterable[str] = ("mass",), decay: float = 0.99, observation_window: int | str = 64
    ) -> None:
        wanted = tuple(statistics)
        self.statistics = tuple(name for name in wanted if name in STATISTICS)
        self.query_statistics = tuple(name for name in wanted if name in QUERY_STATISTICS)
        unknown = [name for name in wanted if name not in STATISTICS + QUERY_STATISTICS]
        if unknown:
            raise ConfigError(
                f"unknown statistics {unknown}; the tracker keeps {', '.join(STATISTICS + QUERY_STATISTICS)}"
            )
        if not 0 < decay <= 1:
            raise ConfigError(f"decay={decay} must lie in (0, 1]")
        self.decay, self.observation_window = decay, observation_window
        self.active = any(name != "reread" for name in self.statistics)

    def observed(self, queries: int) -> int:
        """How many of the last ``queries`` queries are observed."""
        if self.observation_window == "all":
            return queries
        return min(queries, int(self.observation_window))

    def keeps(self, queries: int) -> float:
        """What ``queries`` new queries leave of the weight of those before, in a window of the latest ones.

        Nothing if they fill the window, else a leak of one over its length at each query: which queries were the latest
        would take a number a token and query to remember.
        """
        if self.observation_window == "all":
            return 1.0
        length = int(self.observation_window)
        return 0.0 if queries >= length else (1 - 1 / length) ** queries

    def observation(self, held: dict[str, Tensor], queries: int) -> Observation:
        """``age`` and ``observe`` of ``queries`` new ones, for a kernel."""
        return Observation(held, self.decay, self.keeps(queries), self.observed(queries))

    def age(self, held: dict[str, Tensor], queries: int) -> None:
        """Before ``queries`` new queries are observed: let older ones leave the "window" of ``held``, in place."""
        if "window" in held:
            held["window"].mul_(self.keeps(queries))

    def observe(self, held: dict[str, Tensor], probabilities: Tensor, visible: Tensor | None = None) -> None:
        """Add what ``Q`` queries, oldest first, gave to ``T`` tokens.

        Args:
            held: statistic name to float32 ``[B, H_kv, T]``, updated in place.
            probabilities: float ``[B, H_kv, Q, T]``, averaged over the query heads of each KV head.
            visible: bool broadcastable to ``[B, H_kv, Q, T]``: which tokens each query could see; ``None`` for all.
        """
        if "ema" in held:
            queries = probabilities.shape[2]
            ages = torch.arange(queries - 1, -1, -1, device=probabilities.device)
            weights = (self.decay ** ages.to(probabilities.dtype))[:, None]
            held["ema"].mul_(self.decay**queries).add_((probabilities * weights).sum(2))
        if "mass" in held:
            held["mass"].add_(probabilities.sum(2))
        if "window" in held:
            held["window"].add_(probabilities[:, :, -self.observed(probabilities.shape[2]) :].sum(2))
        if "last" in held:
            held["last"].copy_(probabilities[:, :, -1])
        if "seen" in held:
            if visible is None:
                held["seen"].add_(probabilities.shape[2])
            else:
                held["seen"].add_(visible.expand_as(probabilities).sum(2))

    def observe_rereading(self, held: dict[str, Tensor], probabilities: Tensor) -> None:
        """Keep the largest of what queries gave that only read.

        Args:
            held: as in ``observe``.
            probabilities: float ``[B, H_kv, N, T]``, of ``N`` queries of any heads.
        """
        if "reread" in held:
            most = probabilities.amax(2).clamp_min(torch.finfo(torch.float32).tiny)  # 0 is left for what was never read
            held["reread"].copy_(torch.maximum(held["reread"], most))
