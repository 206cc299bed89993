"""The network: two small layers over standardised features, and what each head has of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fade_policy_learned.features import FEATURES

EMBEDDING = 8
"""Numbers that tell the shared layers which head they look at."""

REACH = 5.0
"""Standard deviations from the mean beyond which a feature counts as no further away: longer contexts than those of the
training stay within what was seen."""


@dataclass(frozen=True)
class Geometry:
    """Shape of the model that a policy is for: layers, KV heads of a layer, channels of a head."""

    layers: int
    heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.layers} layers, {self.heads} KV heads of {self.head_dim} channels"


class ScoreNetwork(nn.Module):
    """Features ``[..., F]`` to a score ``[...]``.

    With a geometry every head of every layer has its own mean and deviation of each feature, a linear term, and
    an embedding that the shared layers see; which head it is follows from the features "layer" and "head".

    Args:
        features: ``F``.
        hidden: width of both hidden layers.
        geometry: the model's, or ``None`` for one network that treats all heads alike.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, features: int, hidden: int, geometry: Geometry | None = None) -> None:
        super().__init__()
        self.hidden, self.geometry = hidden, geometry
        heads = geometry.layers * geometry.heads if geometry else 1
        self.register_buffer("mean", torch.zeros(heads, features))
        self.register_buffer("deviation", torch.ones(heads, features))
        if geometry is not None:
            self.embedding = nn.Embedding(heads, EMBEDDING)
            self.own = nn.Embedding(heads, features + 1)  # weights of the linear term, and its constant
        self.layers = nn.Sequential(
            nn.Linear(features + (EMBEDDING if geometry else 0), hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, 1),
        )

    def initialise(self, generator: torch.Generator) -> None:
        """Draw initial weights; linear terms start at zero."""
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
                nn.init.zeros_(layer.bias)
        if self.geometry is not None:
            nn.init.normal_(self.embedding.weight, 0, 0.5, generator=generator)
            nn.init.zeros_(self.own.weight)

    def standardise(self, features: Tensor) -> None:
        """Take each head's mean and deviation of ``[N, F]``; a feature that never changes is only centred."""
        which = self._which(features)
        count = torch.zeros(len(self.mean)).index_add_(0, which, torch.ones(len(which))).clamp(min=1)[:, None]
        mean = torch.zeros_like(self.mean, dtype=torch.float64).index_add_(0, which, features.double()) / count
        square = torch.zeros_like(mean).index_add_(0, which, (features - mean[which]).double().square())
        deviation = (square / (count - 1).clamp(min=1)).sqrt()
        self.mean.copy_(mean)
        self.deviation.copy_(torch.where(deviation > 1e-6 * mean.abs().clamp(min=1e-6), deviation, 1.0))

    def forward(self, features: Tensor) -> Tensor:
        """Scores ``[...]`` of ``[..., F]``."""
        which = self._which(features)
        x = ((features - self.mean[which]) / self.deviation[which]).clamp(-REACH, REACH)
        if self.geometry is None:
            scores: Tensor = self.layers(x)
            return scores.squeeze(-1)
        own = self.own(which)
        shared = self.layers(torch.cat([x, self.embedding(which)], -1)).squeeze(-1)
        found: Tensor = shared + (own[..., :-1] * x).sum(-1) + own[..., -1]
        return found

    def _which(self, features: Tensor) -> Tensor:
        """Number of the head that each token belongs to, int64 ``[...]``.

        "layer" and "head" are shares of the model's, so that of another model the head at the same depth is meant.
        """
        if self.geometry is None:
            return torch.zeros(features.shape[:-1], dtype=torch.long, device=features.device)
        layer, head = (
            (features[..., FEATURES.index(name)] * count + 0.01).long().clamp(0, count - 1)
            for name, count in (("layer", self.geometry.layers), ("head", self.geometry.heads))
        )
        found: Tensor = layer * self.geometry.heads + head
        return found
