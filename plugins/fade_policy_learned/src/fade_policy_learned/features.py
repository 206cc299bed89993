"""What the network sees of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from fade_core.interfaces import LayerView

FEATURES = (
    "log_mass",  # log of the attention received, a query that could see the token
    "log_recency",  # log of one plus the distance to the newest token
    "relative_position",  # position over logical length
    "key_norm",  # over the mean of the row and head
    "value_norm",  # over the mean of the row and head
    "head",  # head index over heads
    "layer",  # layer index over layers
)
"""Names of the features, in the order of the last axis of ``token_features``. Checkpoints carry them."""

STATISTICS = ("mass", "seen")
"""Tracked statistics that the features are made of."""

_LEAST_MASS = 1e-8  # below what float32 softmax tells apart from nothing over a long context


def token_features(view: LayerView) -> Tensor:
    """Features of every token of ``view``: float32 ``[B, H_kv, T, len(FEATURES)]``, zero where there is no token."""
    valid = view.valid
    positions = view.positions.clamp(min=0).float()
    batch, heads, tokens = positions.shape
    length = max(view.logical_length, 1)
    mass = view.statistic("mass").float() / view.statistic("seen").float().clamp(min=1)
    head = torch.arange(heads, device=positions.device).view(1, heads, 1).expand(batch, heads, tokens)
    columns = (
        torch.where(valid, mass, 0.0).clamp(min=_LEAST_MASS).log(),
        (length - 1 - positions).clamp(min=0).log1p(),
        positions / length,
        _relative_norm(view.keys, valid),
        _relative_norm(view.values, valid),
        head / heads,
        torch.full_like(positions, view.layer / max(view.num_layers, 1)),
    )
    return torch.stack([column.float() for column in columns], dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)


def _relative_norm(x: Tensor, valid: Tensor) -> Tensor:
    norm = torch.where(valid, x.float().norm(dim=-1), 0.0)  # an empty slot may hold anything, NaN included
    mean = norm.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return norm / mean.clamp(min=torch.finfo(torch.float32).tiny)
