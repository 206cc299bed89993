"""Lloyd-Max quantization of a unit Gaussian: the levels with the least mean squared error at a given width."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad


def _cells(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Edges about ascending ``levels`` ``[n]``, a unit Gaussian's density at each ``[n + 1]``, and the mass between ``[n]``."""
    infinity = levels.new_full((1,), math.inf)
    edges = torch.cat([-infinity, (levels[1:] + levels[:-1]) / 2, infinity])
    density = torch.exp(-edges.square() / 2) / math.sqrt(2 * math.pi)
    return edges, density, torch.special.ndtr(edges).diff()


def _error(levels: Tensor) -> float:
    """Mean squared error of ascending ``levels`` ``[n]`` on a unit Gaussian."""
    _, density, mass = _cells(levels)
    return float(1 + 2 * (levels * density.diff()).sum() + (levels.square() * mass).sum())


@cache
def gaussian_levels(bits: int) -> tuple[float, ...]:
    """Reconstruction levels ``2**bits``, ascending and symmetric about 0 (Lloyd 1982, Max 1960)."""
    count = 2**bits
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    # Panter-Dite: the best density of points is the cube root of the source's, a Gaussian of variance 3
    levels = normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count) * math.sqrt(3 * (1 - 1 / count))
    for _ in range(
        20
    ):  # Newton's steps: each centroid moves with the two edges about it, each edge with the two levels about it
        edges, density, mass = _cells(levels)
        centroids = -density.diff() / mass
        if (centroids - levels).abs().max() < 1e-12:
            break
        above = density[1:-1] / 2 * (edges[1:-1] - centroids[:-1]) / mass[:-1]  # [count - 1]
        below = density[1:-1] / 2 * (centroids[1:] - edges[1:-1]) / mass[1:]
        own = pad(above, (0, 1)) + pad(below, (1, 0))
        slope = torch.diag(own) + torch.diag(above, 1) + torch.diag(below, -1)  # [count, count]
        levels = levels + torch.linalg.solve(torch.eye(count, dtype=torch.float64) - slope, centroids - levels)
    levels = (levels - levels.flip(0)) / 2
    return tuple(levels.tolist())


@cache
def uniform_levels(bits: int) -> tuple[float, ...]:
    """Levels ``2**bits`` at even distances, ascending and symmetric about 0, of least mean squared error on a unit Gaussian.

    It is 1% more than that of ``gaussian_levels`` at 2 bits and 22% at 4 (Max 1960).
    """
    count = 2**bits
    place = torch.arange(count, dtype=torch.float64) - (count - 1) / 2

    low, high = 0.0, 4.0  # one minimum: thirds are cut off until it is found
    for _ in range(120):
        left, right = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, right) if _error(place * left) < _error(place * right) else (left, high)
    return tuple((place * ((low + high) / 2)).tolist())


Levels = Literal["gaussian", "uniform"]
"""Which levels codes stand for."""

LEVELS: Mapping[Levels, Callable[[int], tuple[float, ...]]] = {"gaussian": gaussian_levels, "uniform": uniform_levels}


@cache
def gaussian_distortion(bits: int, levels: Levels = "gaussian") -> float:
    """Mean squared error of ``levels`` on a unit Gaussian: 1 at 0 bits, 0.3634 at 1, 0.1175 (uniform ones 0.1188) at 2."""
    return _error(torch.tensor(LEVELS[levels](bits), dtype=torch.float64)) if bits else 1.0


@cache
def levels_on(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Ascending ``levels`` as a tensor; shared, never written to."""
    return torch.tensor(levels, dtype=dtype, device=device)


@cache
def edges_on(levels: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Midpoints between ascending ``levels``: where ``torch.bucketize`` changes code; shared, never written to."""
    exact = torch.tensor(levels, dtype=torch.float64)
    return ((exact[1:] + exact[:-1]) / 2).to(device, dtype)
