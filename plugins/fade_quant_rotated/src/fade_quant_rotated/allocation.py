"""Bits by water-filling: where the next bit saves most, given what each channel is worth."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from fade_core.errors import ConfigError
from fade_core.packed import planes_of
from fade_quant_rotated.lloyd_max import gaussian_distortion

WIDTHS = (0, 1, 2, 3, 4, 5, 6, 8)
"""Every width that can be packed: without 8, the loudest channels are clipped."""


def check_widths(widths: Sequence[int]) -> tuple[int, ...]:
    """Sorted distinct widths. Raises ``ConfigError`` unless they start at 0 and each can be packed."""
    found = tuple(sorted(set(widths)))
    if len(found) < 2 or found[0] != 0:
        raise ConfigError(f"widths={list(widths)} must hold 0 (a dropped channel) and at least one width in 1..8")
    for width in found[1:]:
        planes_of(width)
    return found


def water_fill(worth: Tensor, bits: float, widths: Sequence[int] = WIDTHS, group: int = 1) -> Tensor:
    """Widths that minimise the expected error at an average of at most ``bits``, over all channels at once.

    The error of a channel is its worth times the distortion of a Gaussian at its width; on the lower convex hull of
    that curve the greedy choice is optimal. The curve is that of the best levels whatever levels the codes have: even ones have
    gains that are tried a token, and with their own curve, which falls more slowly, the divergence of answers is larger.

    Args:
        worth: float ``[..., D]``, the error that dropping each channel costs, falling along the last dimension.
        bits: average width of a channel.
        widths: widths to choose from, 0 among them.
        group: neighbouring channels that share a width; divides ``D``.

    Returns:
        int64 ``[..., D]``, falling along the last dimension.

    Raises:
        ConfigError: widths that cannot be packed, a group that does not divide ``D``, or more bits than the widest.
    """
    widths = check_widths(widths)
    channels = worth.shape[-1]
    if group < 1 or channels % group:
        raise ConfigError(f"group={group} must divide the {channels} channels of a head")
    if not 0 <= bits <= widths[-1]:
        raise ConfigError(f"{bits:.3f} bits a channel cannot be had from widths {list(widths)}")
    grouped = worth.double().unflatten(-1, (-1, group)).sum(-1)
    steps = _hull(widths)
    slope = torch.tensor([gain for _, gain in steps], dtype=torch.float64)
    cost = torch.tensor([width for width, _ in steps], dtype=torch.float64)
    gains = (grouped.flatten()[:, None] * slope).flatten()
    order = torch.argsort(gains, descending=True, stable=True)
    costs = cost.repeat(grouped.numel())[order]
    taken = torch.zeros_like(gains, dtype=torch.bool)
    taken[order] = costs.cumsum(0) <= bits * grouped.numel() + 1e-9
    given = (taken.view(-1, len(steps)) * cost).sum(-1).long()
    return given.view(grouped.shape).repeat_interleave(group, dim=-1)


def saved_by_planes(worth: Tensor, bits: int, widths: Sequence[int], group: int) -> Tensor:
    """What the first, second, ... ``bits`` bits save that ``water_fill`` gives the channels of a layer and side.

    Args:
        worth: float ``[H, D]``, as ``water_fill`` takes it, like ``widths`` and ``group``.
        bits: bits of a plane, over all its channels.

    Returns:
        float64 ``[planes]``: expected error saved, falling.
    """
    steps = _hull(check_widths(widths))
    slope = torch.tensor([gain for _, gain in steps], dtype=torch.float64)
    cost = torch.tensor([width for width, _ in steps], dtype=torch.float64) * group
    grouped = worth.double().unflatten(-1, (-1, group)).mean(-1).flatten()
    gains, order = (grouped[:, None] * slope).flatten().sort(descending=True, stable=True)
    costs = cost.repeat(len(grouped))[order]
    ends, total = costs.cumsum(0), (gains * costs).cumsum(0)
    spent = (bits * torch.arange(1, -(-int(ends[-1]) // bits) + 1, dtype=torch.float64)).clamp_max(ends[-1])
    step = torch.searchsorted(ends, spent)
    saved: Tensor = total[step] - (ends[step] - spent) * gains[step]
    return torch.diff(saved, prepend=saved.new_zeros(1))


@lru_cache(maxsize=64)
def _hull(widths: tuple[int, ...]) -> list[tuple[int, float]]:
    """Steps (bits, error saved a bit) along the lower convex hull of a Gaussian's distortion; savings fall."""
    points = [(width, gaussian_distortion(width)) for width in widths]
    steps, at = [], 0
    while at + 1 < len(points):
        width, error = points[at]
        best = max(
            range(at + 1, len(points)), key=lambda j: ((error - points[j][1]) / (points[j][0] - width), points[j][0])
        )
        steps.append((points[best][0] - width, (error - points[best][1]) / (points[best][0] - width)))
        at = best
    return steps
