"""Implementations of the named ops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from fade_core.interfaces.component import ComponentConfig
from fade_core.packed import PackedFormat

Op = Literal["append", "decode_attention", "dequantize", "attention_mass", "encode"]


@dataclass(frozen=True)
class Support:
    """Answer of ``Kernel.supports``: truthy when it can run, else ``reason`` says why not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


class Kernel(ABC):
    """One implementation of a named op. Choosing another implementation never changes meaning.

    Attributes:
        name: implementation name, unique for its op ("torch", "triton", "cpu").
        op: which op it implements.
        priority: among those that support a case, ``auto`` takes the highest.
        reads_counts: whether it finds out for itself how much of a buffer is in use, as what runs on a GPU must; on a CPU
            others are shown no more than that.
        observes: whether ``attention_mass`` takes ``noted``, an ``Observation``, and lets the statistics follow in place of
            giving the probabilities. Asked by ``accepts``; where it says no, the core does so with those.
        shifts: whether it reads ``PackedSegment.shift``; where it does not, the core computes what is shifted itself.
    """

    name: ClassVar[str] = ""
    op: ClassVar[Op] = "decode_attention"
    priority: ClassVar[int] = 0
    reads_counts: ClassVar[bool] = False
    observes: ClassVar[bool] = False
    shifts: ClassVar[bool] = False

    @abstractmethod
    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        """Whether this case can run here, with the reason if not. Asked once, when a cache is built.

        Without a ``format`` nothing is known of the codes yet: a yes then means that ``accepts`` will look at each call.
        """

    def accepts(self, *args: Any, **kwargs: Any) -> Support:
        """Whether this very call can run; asked before it, with the same arguments.

        A mask or a number of queries is only known then. What is refused here the core computes with its oracle, and
        says so in a "fallback" event, once a layer and reason.
        """
        return Support(True)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op (signature: the oracle's in ``fade_core.ops``)."""


class KernelConfig(ComponentConfig):
    """Which implementation runs each op. ``kind = "auto"`` takes the fastest that supports the case."""

    kind: str = "auto"
