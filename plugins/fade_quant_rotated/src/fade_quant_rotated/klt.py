"""The Karhunen-Loeve transform in a metric: channels that are uncorrelated, and whose errors add up in that metric."""

from __future__ import annotations

import torch
from torch import Tensor

METRIC_FLOOR = 1e-4


def weighted_klt(cov: Tensor, metric: Tensor, floor: float = METRIC_FLOOR) -> tuple[Tensor, Tensor]:
    """``T`` such that ``y = x T`` is uncorrelated with variance ``v`` and ``|y - y'|^2 = (x - x')^T metric (x - x')``.

    For keys the metric is the queries' second moment (a logit's squared error), for values ``W_o^T W_o`` (the squared
    error of what the head adds to the residual stream).

    Args:
        cov: float64 ``[..., D, D]``, covariance of ``x``.
        metric: float64 ``[..., D, D]``, symmetric positive semi-definite.
        floor: eigenvalues of the metric are lifted to this share of the largest, so that ``T`` stays invertible.

    Returns:
        ``T`` ``[..., D, D]`` and ``v`` ``[..., D]``, falling; each column's largest entry is positive.
    """
    values, vectors = torch.linalg.eigh(metric)
    values = values.clamp_min(values.amax(-1, keepdim=True) * floor)
    root = vectors * values.sqrt()[..., None, :] @ vectors.transpose(-1, -2)
    variance, basis = torch.linalg.eigh(root @ cov @ root)
    variance, basis = variance.flip(-1), basis.flip(-1)
    variance = variance.clamp_min(variance[..., :1] * 1e-10).clamp_min(torch.finfo(torch.float32).tiny)
    transform = root @ basis
    largest = transform.gather(-2, transform.abs().argmax(-2, keepdim=True))
    return transform * largest.sign(), variance
