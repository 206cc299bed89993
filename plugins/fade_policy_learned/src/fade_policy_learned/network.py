"""The network: two small layers over standardised features."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScoreNetwork(nn.Module):
    """Features ``[..., F]`` to a score ``[...]``.

    Args:
        features: ``F``.
        hidden: width of both hidden layers.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.layers = nn.Sequential(
            nn.Linear(features, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 1),
        )

    def standardise(self, features: Tensor) -> None:
        """Take mean and deviation of ``[N, F]``; a feature that never changes is only centred."""
        self.mean.copy_(features.mean(0))
        deviation = features.std(0)
        self.deviation.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``[...]`` of ``[..., F]``."""
        scores: Tensor = self.layers((features - self.mean) / self.deviation)
        return scores.squeeze(-1)
