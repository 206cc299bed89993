"""Packing many tokens at once and unpacking them: the ops ``encode`` and ``dequantize``, and their oracles, the quantizers."""

from __future__ import annotations

from dataclasses import dataclass, field
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


class TorchDequantize(Kernel):
    """``dequantize`` in torch: every quantizer, as it decodes itself."""

    name: ClassVar[str] = "torch"
    op: ClassVar[Op] = "dequantize"

    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        return Support(True)

    def __call__(self, quantizer: Quantizer, packed: Packed) -> Tensor:
        return quantizer.decode(packed)


@dataclass(frozen=True)
class Codec:
    """How a layer packs and unpacks: by the kernels that were chosen where they take a call, by the quantizer elsewhere.

    Attributes:
        encoder: implementation of ``encode``.
        decoder: implementation of ``dequantize``.
    """

    encoder: Kernel = field(default_factory=TorchEncode)
    decoder: Kernel = field(default_factory=TorchDequantize)

    def encode(self, quantizer: Quantizer, tokens: Tensor) -> Packed:
        """``tokens`` ``[B, H_kv, T, D]`` packed."""
        ours = bool(self.encoder.accepts(quantizer, tokens))
        packed: Packed = self.encoder(quantizer, tokens) if ours else quantizer.encode(tokens)
        return packed

    def decode(self, quantizer: Quantizer, packed: Packed) -> Tensor:
        """Tokens ``[B, H_kv, T, D]`` in ``packed.dtype``."""
        ours = bool(self.decoder.accepts(quantizer, packed))
        tokens: Tensor = self.decoder(quantizer, packed) if ours else quantizer.decode(packed)
        return tokens
