"""Host tensors on their way to a device, without waiting for what the device has still to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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


def arriving(tensor: Tensor) -> Callable[[], Tensor]:
    """A copy of ``tensor`` on the CPU: called, the result waits for it, and for nothing that its device is asked for later."""
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy = tensor.to("cpu", non_blocking=True)  # pinned
    there = torch.cuda.current_stream(tensor.device).record_event()

    def arrived() -> Tensor:
        there.synchronize()
        return copy

    return arrived


def fetched(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Copies of ``tensors`` as they are now, on the CPU: called, the result waits for them, and for nothing that comes later.

    On a GPU they travel on a stream of their own, while the device goes on.
    """
    if all(tensor.device.type != "cuda" for tensor in tensors):
        return lambda: [tensor.cpu() for tensor in tensors]
    here, aside, there = torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Event()
    aside.wait_stream(here)
    with torch.cuda.stream(aside):
        copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in tensors]
        there.record()
    for tensor in tensors:
        tensor.record_stream(aside)

    def arrived() -> list[Tensor]:
        there.synchronize()
        return copies

    return arrived
