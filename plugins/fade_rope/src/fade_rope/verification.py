"""Does FADE rotate as this model does? Asked of the model itself, through its forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fade_core.errors import InputError
from fade_rope.schemes import scheme_from_config


@torch.no_grad()
def verify(model: nn.Module, positions: Sequence[int] = (0, 1, 2, 3, 5, 17, 60, 121)) -> dict[int, float]:
    """Compare FADE's scheme of every layer with the keys that the model really caches.

    The model reads the same tokens twice, once all at position 0 and once at ``positions``, while its attention is
    muted so that keys depend on their own token and position alone. The first keys, rotated by FADE, must be the
    second. Weights are not touched.

    Args:
        model: a causal language model of transformers, on any device, in evaluation mode.
        positions: where to look; within the table for learned positions (whose keys depend on them: not a rotation).

    Returns:
        Layer index to relative error (Frobenius norms, float32), for the layers that cache keys. About 1e-7 in float32
        where the scheme is right, a rounding of the dtype in others, above 0.1 where it is wrong.

    Raises:
        InputError: the model returns no cache with keys a layer.
        ConfigError: as ``scheme_from_config``.
    """
    device = next(model.parameters()).device
    at = torch.tensor(positions, device=device)
    tokens = torch.arange(len(positions), device=device)[None] + 5
    with _muted_attention(model):
        base = _cached_keys(model, tokens, torch.zeros_like(at)[None])
        found = _cached_keys(model, tokens, at[None])
    errors: dict[int, float] = {}
    for layer, keys in found.items():
        last = at[-keys.shape[2] :]  # a sliding layer keeps its window only
        scheme = scheme_from_config(getattr(model, "config"), layer)  # noqa: B009
        length = at.amax() + 1
        plain = scheme.unrotate(base[layer].float(), torch.zeros_like(last), length=length)
        errors[layer] = relative_error(scheme.rotate(plain, last, length=length), keys.float())
    return errors


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``|found - expected| / |expected|`` in Frobenius norms."""
    return float((found - expected).norm() / expected.norm())


def _cached_keys(model: nn.Module, tokens: Tensor, positions: Tensor) -> dict[int, Tensor]:
    output = model(input_ids=tokens, position_ids=positions, use_cache=True)
    layers = getattr(getattr(output, "past_key_values", None), "layers", None)
    keys = {i: layer.keys for i, layer in enumerate(layers or []) if getattr(layer, "keys", None) is not None}
    if not keys:
        raise InputError(f"{type(model).__name__} returns no past_key_values with keys a layer; nothing to compare")
    return keys


@contextmanager
def _muted_attention(model: nn.Module) -> Iterator[None]:
    """Make every attention block that caches answer zero, for as long as this lasts."""

    def mute(module: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return torch.zeros_like(output)
        return (torch.zeros_like(output[0]), *output[1:])

    blocks = [m for m in model.modules() if hasattr(m, "layer_idx") and "Attention" in type(m).__name__]
    hooks = [block.register_forward_hook(mute) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
