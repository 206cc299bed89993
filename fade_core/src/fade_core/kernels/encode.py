"""Packing many tokens at once, as a prompt brings them: the op ``encode`` and its oracle, the quantizer itself."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fade_core.interfaces import Kernel, Op, Quantizer, Support
from fade_core.packed import Packed, PackedFormat


class TorchEncode(Kernel):
    """``encode`` in torch: every quantizer, as it encodes itself."""

    name: ClassVar[str] = "torch"
    op: ClassVar[Op] = "encode"

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        return Support(True)

    def __call__(self, quantizer: Quantizer, tokens: Tensor) -> Packed:
        return quantizer.encode(tokens)


def encode(kernel: Kernel, quantizer: Quantizer, tokens: Tensor) -> Packed:
    """``tokens`` ``[B, H_kv, T, D]`` packed by ``kernel`` if it accepts them, else by ``quantizer`` itself."""
    packed: Packed = kernel(quantizer, tokens) if kernel.accepts(quantizer, tokens) else quantizer.encode(tokens)
    return packed
