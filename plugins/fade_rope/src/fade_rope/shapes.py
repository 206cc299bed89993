"""What the schemes accept: keys or queries, and integers laid out as positions."""

from __future__ import annotations

import torch
from torch import Tensor

from fade_core.errors import InputError

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_heads(x: Tensor, head_dim: int) -> None:
    """Refuse anything but a floating ``[B, H, T, head_dim]``. Raises ``InputError``."""
    if x.dim() != 4 or x.shape[-1] != head_dim:
        raise InputError(f"a RoPE scheme takes [B, H, T, D={head_dim}]; found a tensor of shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise InputError(f"a RoPE scheme takes floating-point keys or queries; found {x.dtype}")


def per_token(value: Tensor | int, x: Tensor, name: str) -> Tensor:
    """Lay integers out against the tokens of ``x [B, H, T, D]``.

    Args:
        value: one integer for all, ``[T]``, ``[B, T]`` or ``[B, H, T]``; any size may be 1.
        x: the tokens.
        name: what to call ``value`` in an error.

    Returns:
        int64 ``[b, h, t]`` on the device of ``x``, broadcastable to ``[B, H, T]``.

    Raises:
        InputError: floating or boolean values, or a shape that does not fit.
    """
    tensor = torch.as_tensor(value, device=x.device)
    if tensor.dtype not in _INTEGERS:
        raise InputError(f"{name} must be integers; found {tensor.dtype}")
    if tensor.dim() > 3:
        raise InputError(f"{name} has shape {tuple(tensor.shape)}; give [T], [B, T] or [B, H, T]")
    found = tuple(tensor.shape)
    if tensor.dim() == 2:
        tensor = tensor[:, None]
    tensor = tensor.reshape((1,) * (3 - tensor.dim()) + tuple(tensor.shape))
    if any(size not in (1, want) for size, want in zip(tensor.shape, x.shape[:3], strict=True)):
        b, h, t = x.shape[:3]
        raise InputError(f"{name} has shape {found}; [T={t}], [B={b}, T={t}] or [B={b}, H={h}, T={t}] would fit")
    return tensor.long()
