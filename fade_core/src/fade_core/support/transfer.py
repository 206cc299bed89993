"""Host tensors on their way to a device, without waiting for what the device has still to do."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``tensor`` on ``device``. From the host to a GPU it goes through pinned memory, in the order of the stream.

    A plain copy would first wait until the GPU has done all that was asked of it, and leave it idle meanwhile.
    """
    if dtype is not None and tensor.device.type == "cpu":
        tensor = tensor.to(dtype)
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device, dtype)
