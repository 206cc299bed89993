"""Turning pairs of channels: the one arithmetic that all rotary embeddings share."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Pairing = Literal["half", "adjacent"]
"""Which channels turn together: ``(i, i + R/2)`` (GPT-NeoX, Llama) or ``(2i, 2i + 1)`` (GPT-J, GLM, Cohere)."""


def turn(x: Tensor, cos: Tensor, sin: Tensor, pairing: Pairing) -> Tensor:
    """Multiply the first ``2P`` channels of ``x`` by the matrices ``[[cos, -sin], [sin, cos]]``, pair by pair.

    Args:
        x: ``[B, H, T, D]``, floating.
        cos: float32 ``[..., T, P]`` with ``2P <= D``, broadcastable against ``x``; so is ``sin``.
        sin: as ``cos``.
        pairing: which channels form a pair.

    Returns:
        A new tensor like ``x``, computed in float32; channels from ``2P`` on are copied.
    """
    width = 2 * cos.shape[-1]
    rotated = x[..., :width].float()
    if pairing == "half":
        first, second = rotated.chunk(2, dim=-1)
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    pair = (first * cos).sub_(second * sin), (second * cos).add_(first * sin)
    turned = torch.cat(pair, dim=-1) if pairing == "half" else torch.stack(pair, dim=-1).flatten(-2)
    turned = turned.to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat([turned, x[..., width:]], dim=-1)


def reduced(angle: Tensor) -> Tensor:
    """Float64 radians to float32 within half a turn, so that cosine and sine lose nothing to large angles."""
    return (angle - (angle / math.tau).round_() * math.tau).float()
