"""What a layer's latest queries were like: their mean and covariance, for policies that expect the next ones to be alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class _Moments:
    """Weight ``[B]``, mean ``[B, H_q, D]`` and, if it is kept, scatter ``[B, H_q, D, D]`` (covariance times weight)."""

    weight: Tensor
    mean: Tensor
    scatter: Tensor | None


class QueryMoments:
    """Weighted mean and covariance of queries, one a row and query head; float32, in place once there are any.

    Costs ``4 D`` bytes a row and query head, and ``4 D ** 2`` more with the covariance.

    Args:
        covariance: keep it, beside the mean.
    """

    def __init__(self, covariance: bool) -> None:
        self.covariance = covariance
        self._now: _Moments | None = None

    @classmethod
    def over(cls, tensors: Mapping[str, Tensor]) -> QueryMoments:
        """Moments that live in ``tensors`` (what ``tensors()`` gave), and are written there."""
        moments = cls("scatter" in tensors)
        moments._now = _Moments(tensors["weight"], tensors["mean"], tensors.get("scatter"))
        return moments

    def observe(self, queries: Tensor, keep: float, real: Tensor | None = None) -> None:
        """Take in new queries.

        Args:
            queries: ``[B, H_q, Q, D]``.
            keep: factor of the weight of all queries before, from 0 (forget them) to 1.
            real: bool ``[B, Q]``, false for padding; ``None`` for none.
        """
        queries = queries.detach().float()
        batch, heads, count, dim = queries.shape
        chosen = queries.new_ones((batch, count)) if real is None else real.float()
        weight = chosen.sum(-1)
        shares = (chosen / weight.clamp_min(1)[:, None])[:, None, :, None]
        mean = (queries * shares).sum(2)
        if self._now is None:
            scatter = queries.new_zeros((batch, heads, dim, dim)) if self.covariance else None
            self._now = _Moments(torch.zeros_like(weight), torch.zeros_like(mean), scatter)
        old = self._now
        before = keep * old.weight
        total = (before + weight).clamp_min(torch.finfo(torch.float32).tiny)
        step = mean - old.mean
        if old.scatter is not None:
            apart = (queries - mean[:, :, None]) * chosen[:, None, :, None]
            between = (before * weight / total)[:, None, None, None] * step[..., :, None] * step[..., None, :]
            old.scatter.mul_(keep).add_(apart.mT @ apart).add_(between)
        old.mean.add_((weight / total)[:, None, None] * step)
        old.weight.copy_(before + weight)

    def statistics(self) -> dict[str, Tensor]:
        """Mean ``[B, H_q, D]`` and, if kept, covariance ``[B, H_q, D, D]``, by name; empty before any query."""
        if self._now is None:
            return {}
        found = {"query_mean": self._now.mean}
        if self._now.scatter is not None:
            weight = self._now.weight.clamp_min(torch.finfo(torch.float32).tiny)
            found["query_covariance"] = self._now.scatter / weight[:, None, None, None]
        return found

    def select_rows(self, index: Tensor) -> None:
        """Row ``i`` becomes what row ``index[i]`` was."""
        if self._now is not None:
            at = index.to(self._now.mean.device)
            if len(at) == len(self._now.weight):
                for held in self.tensors().values():
                    held.copy_(held[at])
                return
            scatter = None if self._now.scatter is None else self._now.scatter[at]
            self._now = _Moments(self._now.weight[at], self._now.mean[at], scatter)

    def join(self, other: QueryMoments, rows: tuple[int, int]) -> None:
        """Put ``other``'s rows behind one's own.

        Args:
            other: moments of an equal layer.
            rows: rows of each; a side that has not seen a query has not counted them.
        """
        sides = self._now, other._now
        known = sides[0] or sides[1]
        if known is None:
            return

        def both(name: str) -> Tensor:
            like: Tensor = getattr(known, name)
            parts = [
                like.new_zeros((count, *like.shape[1:])) if side is None else getattr(side, name)
                for side, count in zip(sides, rows, strict=True)
            ]
            return torch.cat(parts)

        self._now = _Moments(both("weight"), both("mean"), None if known.scatter is None else both("scatter"))

    # --- what is held ---
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor held; ``load`` takes them back."""
        if self._now is None:
            return {}
        held = {"weight": self._now.weight, "mean": self._now.mean}
        return held if self._now.scatter is None else held | {"scatter": self._now.scatter}

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Take over what ``tensors`` gave."""
        moved = {name: tensor.to(device).clone() for name, tensor in state.items()}
        self._now = _Moments(moved["weight"], moved["mean"], moved.get("scatter")) if moved else None

    def restore(self, before: Mapping[str, Tensor]) -> None:
        """Be again as when ``tensors`` gave ``before``, in place."""
        if not before:
            self._now = None
        for name, held in self.tensors().items():
            held.copy_(before[name])
