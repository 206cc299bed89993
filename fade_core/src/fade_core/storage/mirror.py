"""Small integers that host and device both know."""

from __future__ import annotations

import torch
from torch import Tensor

from fade_core.support.transfer import sent


class Mirror:
    """int32 numbers with a copy on the device; on a CPU both are one tensor.

    The host writes ``host`` and calls ``publish``; steps write ``device``, and ``pull`` reads that back, or ``host`` does when
    it is next asked for, after ``moved``.

    Args:
        numbers: any integers, on the CPU.
        device: where kernels read the numbers.

    Attributes:
        device: the device's, of the same shape.
    """

    def __init__(self, numbers: Tensor, device: torch.device) -> None:
        self._host, self.device = torch.empty(0), torch.empty(0, device=device)
        self._unread = False
        self.replace(numbers)

    @property
    def host(self) -> Tensor:
        """The host's numbers; waits for the device if it has ``moved`` since they were read."""
        if self._unread:
            self.pull()
        return self._host

    def replace(self, numbers: Tensor) -> None:
        """Take over ``numbers`` (on the CPU): in place, for ``publish`` to tell, unless their shape is another."""
        self._unread = False
        if self._host.dtype == torch.int32 and numbers.shape == self._host.shape:
            self._host.copy_(numbers)
            return
        self._host, device = torch.empty(numbers.shape, dtype=torch.int32).copy_(numbers), self.device.device
        self.device = self._host if device.type == "cpu" else sent(self._host, device)

    def publish(self) -> None:
        """Write the host's numbers to the device."""
        if self.device is not self._host:
            self.device.copy_(sent(self.host, self.device.device))

    def moved(self) -> None:
        """The device's numbers are others now; the host reads them when it needs them."""
        self._unread = self.device is not self._host

    def pull(self, numbers: Tensor | None = None) -> None:
        """Read the device's numbers back; waits for the device, unless they are ``numbers`` that were read already."""
        self._unread = False
        if self.device is not self._host:
            self._host.copy_(self.device if numbers is None else numbers.view_as(self._host))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Every tensor held, by what it is for."""
        return {name: self._host} if self.device is self._host else {name: self._host, f"device.{name}": self.device}
