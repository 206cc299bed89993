"""Tokens of a view lie in any order, and other heads may hold others: what has to do with neighbours goes by position."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Pool = Literal["mean", "max"]


def pooled(x: Tensor, positions: Tensor, radius: int, pool: Pool = "mean") -> Tensor:
    """Mean or maximum over the positions within ``radius`` of each token; those that hold no token count as 0.

    Args:
        x: float ``[B, H_kv, T]``, not negative.
        positions: int64 ``[B, H_kv, T]``, all different but for the -1 of empty slots.
        radius: 0 gives ``x`` back.
        pool: "mean" (over ``2 * radius + 1``) or "max".
    """
    where, order = positions.sort(dim=-1)
    sorted_x = x.masked_fill(positions < 0, 0).gather(-1, order)
    found = sorted_x.clone()
    for step in range(1, min(radius, x.shape[-1] - 1) + 1):
        near = (where[..., step:] - where[..., :-step] <= radius) & (where[..., :-step] >= 0)
        older, newer = (t.masked_fill(~near, 0) for t in (sorted_x[..., :-step], sorted_x[..., step:]))
        if pool == "mean":
            found[..., step:] += older
            found[..., :-step] += newer
        else:
            found[..., step:] = torch.maximum(found[..., step:], older)
            found[..., :-step] = torch.maximum(found[..., :-step], newer)
    if pool == "mean":
        found = found / (2 * radius + 1)
    return torch.empty_like(found).scatter_(-1, order, found)


def mean_over_heads(x: Tensor, positions: Tensor) -> Tensor:
    """Mean over heads of what each has at a token's position, ``[B, H_kv, T]``; a head that lacks it counts as 0.

    Args:
        x: float ``[B, H_kv, T]``.
        positions: int64 ``[B, H_kv, T]``, -1 for empty slots.
    """
    flat = x.masked_fill(positions < 0, 0).flatten(1)
    where, order = positions.flatten(1).sort(dim=-1, stable=True)
    group = torch.nn.functional.pad((where.diff(dim=-1) != 0).long().cumsum(-1), (1, 0))
    sums = torch.zeros_like(flat).scatter_add_(1, group, flat.gather(1, order))
    means = torch.empty_like(flat).scatter_(1, order, sums.gather(1, group)) / x.shape[1]
    return means.view_as(x)
