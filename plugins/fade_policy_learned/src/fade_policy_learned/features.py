"""What the network sees of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from fade_core.interfaces import LayerView

FEATURES = (
    "log_mass",  # log of the attention received, a query that could see the token
    "log_ema",  # the same, over the latest queries
    "log_last",  # the same, of the newest query
    "log_recency",  # log of one plus the distance to the newest token
    "relative_position",  # position over logical length
    "key_norm",  # over the mean of the row and head
    "value_norm",  # over the mean of the row and head
    "log_near",  # log of the mean mass of the tokens up to 2 positions away
    "log_around",  # of those up to 8 positions away
    "log_heads",  # log of the mean mass that the heads give to the position
    "value_distance",  # from the mean value of the row and head, over the mean distance
    "key_likeness",  # cosine with the mean key of the row and head
    "head",  # head index over heads
    "layer",  # layer index over layers
)
"""Names of the features, in the order of the last axis of ``token_features``. Checkpoints carry them."""

STATISTICS = ("mass", "seen", "ema", "last")
"""Tracked statistics that the features are made of."""

DECAY = 0.99
"""What "ema" is multiplied by at each query."""

_LEAST_MASS = 1e-8  # below what float32 softmax tells apart from nothing over a long context
_TINY = torch.finfo(torch.float32).tiny


def token_features(view: LayerView) -> Tensor:
    """Features of every token of ``view``: float32 ``[B, H_kv, T, len(FEATURES)]``, zero where there is no token.

    They depend on the tokens, not on the slots that they lie in; rows do not see one another.

    Raises:
        InputError: if the view does not carry ``STATISTICS``.
    """
    valid = view.valid
    positions = view.positions.clamp(min=0)
    batch, heads, tokens = positions.shape
    length = max(view.logical_length, 1)
    seen = _clean(view.statistic("seen"), valid).clamp(min=1)
    mass = _clean(view.statistic("mass"), valid) / seen
    weight = (1 - DECAY**seen) / (1 - DECAY)  # what "ema" comes to for a token that gets everything
    keys, values = (_clean(x, valid.unsqueeze(-1)) for x in (view.keys, view.values))
    head = torch.arange(heads, device=positions.device).view(1, heads, 1).expand(batch, heads, tokens)
    near, around, across = _neighbours(mass, positions, valid, length)
    columns = (
        _log(mass),
        _log(_clean(view.statistic("ema"), valid) / weight),
        _log(_clean(view.statistic("last"), valid)),
        (length - 1 - positions).clamp(min=0).float().log1p(),
        positions / length,
        _over_mean(keys.norm(dim=-1), valid),
        _over_mean(values.norm(dim=-1), valid),
        _log(near),
        _log(around),
        _log(across),
        _over_mean((values - _mean(values, valid)).norm(dim=-1), valid),
        torch.nn.functional.cosine_similarity(keys, _mean(keys, valid), dim=-1),
        head / heads,
        torch.full_like(mass, view.layer / max(view.num_layers, 1)),
    )
    return torch.stack([column.float() for column in columns], dim=-1).masked_fill(~valid.unsqueeze(-1), 0.0)


def _neighbours(mass: Tensor, positions: Tensor, valid: Tensor, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean mass of the tokens within 2 and 8 positions, and of one position in all heads; absent tokens do not count."""
    where = positions.where(valid, length)
    laid = torch.stack([mass, valid.float()]).new_zeros(2, *mass.shape[:2], length + 1)
    laid.scatter_(3, where.expand(2, *where.shape), torch.stack([mass, valid.float()]))
    laid[..., length] = 0

    def mean(sums: Tensor) -> Tensor:
        return (sums[0] / sums[1].clamp(min=_TINY)).gather(-1, where)

    pooled = [torch.nn.functional.avg_pool1d(laid.flatten(0, 1), 2 * r + 1, 1, r).view_as(laid) for r in (2, 8)]
    return mean(pooled[0]), mean(pooled[1]), mean(laid.sum(2, keepdim=True).expand_as(laid))


def _clean(x: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, x.float(), 0.0)  # an empty slot may hold anything, NaN included


def _log(share: Tensor) -> Tensor:
    return share.clamp(min=_LEAST_MASS).log()


def _mean(x: Tensor, valid: Tensor) -> Tensor:
    return x.sum(-2, keepdim=True) / valid.sum(-1).clamp(min=1)[..., None, None]


def _over_mean(norm: Tensor, valid: Tensor) -> Tensor:
    norm = norm.where(valid, 0.0)
    mean = norm.sum(-1, keepdim=True) / valid.sum(-1, keepdim=True).clamp(min=1)
    return norm / mean.clamp(min=_TINY)
