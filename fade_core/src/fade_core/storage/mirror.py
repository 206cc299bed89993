"""Small integers that host and device both know."""

from __future__ import annotations

import torch
from torch import Tensor

from fade_core.support.transfer import sent


class Mirror:
    """int32 numbers with a copy on the device; on a CPU both are one tensor.

    The host writes ``host`` and calls ``publish``; steps write ``device``, and ``pull`` reads that back.

    Args:
        host: int32, on the CPU.
        device: where kernels read the numbers.

    Attributes:
        host: the host's numbers.
        device: the device's, of the same shape.
    """

    def __init__(self, host: Tensor, device: torch.device) -> None:
        self.host = host.to(torch.int32).contiguous()
        self.device = self.host if device.type == "cpu" else sent(self.host, device)

    def set(self, numbers: Tensor) -> None:
        """Write ``numbers`` (any integers of this shape, on the CPU) in place, here and on the device."""
        self.host.copy_(numbers)
        self.publish()

    def publish(self) -> None:
        """Write the host's numbers to the device."""
        if self.device is not self.host:
            self.device.copy_(sent(self.host, self.device.device))

    def pull(self) -> None:
        """Read the device's numbers back; waits for the device."""
        if self.device is not self.host:
            self.host.copy_(self.device)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        return {name: self.host} if self.device is self.host else {name: self.host, f"device.{name}": self.device}
