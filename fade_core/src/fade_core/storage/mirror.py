"""Small integers that host and device both know."""

from __future__ import annotations

import torch
from torch import Tensor

from fade_core.support.transfer import sent


class Mirror:
    """int32 numbers with a copy on the device; on a CPU both are one tensor.

    The host writes ``host`` and calls ``publish``; steps write ``device``, and ``pull`` reads that back.

    Args:
        numbers: any integers, on the CPU.
        device: where kernels read the numbers.

    Attributes:
        host: the host's numbers.
        device: the device's, of the same shape.
    """

    def __init__(self, numbers: Tensor, device: torch.device) -> None:
        self.host, self.device = torch.empty(0), torch.empty(0, device=device)
        self.replace(numbers)

    def replace(self, numbers: Tensor) -> None:
        """Take over ``numbers`` (on the CPU): in place, for ``publish`` to tell, unless their shape is another."""
        if self.host.dtype == torch.int32 and numbers.shape == self.host.shape:
            self.host.copy_(numbers)
            return
        self.host, device = torch.empty(numbers.shape, dtype=torch.int32).copy_(numbers), self.device.device
        self.device = self.host if device.type == "cpu" else sent(self.host, device)

    def publish(self) -> None:
        """Write the host's numbers to the device."""
        if self.device is not self.host:
            self.device.copy_(sent(self.host, self.device.device))

    def pull(self, numbers: Tensor | None = None) -> None:
        """Read the device's numbers back; waits for the device, unless they are ``numbers`` that were read already."""
        if self.device is not self.host:
            self.host.copy_(self.device if numbers is None else numbers.view_as(self.host))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        return {name: self.host} if self.device is self.host else {name: self.host, f"device.{name}": self.device}
