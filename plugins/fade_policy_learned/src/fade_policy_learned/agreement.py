"""How well a ranking foresees which tokens will matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fade_policy_learned.features import FEATURES
from fade_policy_learned.policy import LearnedPolicy
from fade_policy_learned.traces import Traces


@dataclass(frozen=True)
class Agreement:
    """What keeping the best tokens of each list by some score amounts to, on average over lists.

    Attributes:
        overlap_half: share of the truly better half that is among the better half by score; chance gives 0.5.
        worth_half: share of the worth that the better half by score holds.
        worth_quarter: share of it that the best quarter holds.
    """

    overlap_half: float
    worth_half: float
    worth_quarter: float


def agreement(scores: Tensor, targets: Tensor, lists: Tensor) -> Agreement:
    """Compare scores ``[N]`` with worth ``[N]`` within each list (int64 ``[N]``, each in one run).

    Lists of one token or without worth are skipped; NaN if none is left.
    """
    found = []
    sizes = torch.unique_consecutive(lists, return_counts=True)[1].tolist()
    for score, worth in zip(scores.split(sizes), targets.split(sizes), strict=True):
        total = worth.sum()
        if len(worth) < 2 or total <= 0:
            continue
        half, quarter = (len(worth) // 2, max(len(worth) // 4, 1))
        ranked = score.argsort(descending=True, stable=True)
        best = torch.zeros(len(worth), dtype=torch.bool)
        best[worth.argsort(descending=True, stable=True)[:half]] = True
        found.append(
            torch.stack(
                [best[ranked[:half]].float().mean(), *(worth[ranked[:n]].sum() / total for n in (half, quarter))]
            )
        )
    return Agreement(*torch.stack(found).mean(0).tolist()) if found else Agreement(*[float("nan")] * 3)


def rankings(policy: LearnedPolicy, traces: Traces, chosen: Tensor) -> dict[str, Agreement]:
    """Of the policy and of what needs no training, over the tokens ``chosen`` (bool ``[N]``); the worth itself comes last."""
    features, targets, lists = (t[chosen] for t in (traces.features, traces.targets, traces.lists))
    with torch.no_grad():
        learned = torch.cat([policy.network(part) for part in features.split(65536)])

    def column(name: str) -> Tensor:
        return features[:, FEATURES.index(name)]

    scores = {
        "learned": learned,
        "normalised h2o": column("log_mass"),
        "ema": column("log_ema"),
        "recency": -column("log_recency"),
        "the worth itself": targets,
    }
    return {name: agreement(score, targets, lists) for name, score in scores.items()}
