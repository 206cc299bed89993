"""What the kernel is compared with: torch's own bf16 attention, in every way that decodes grouped heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fade_kernels_triton.bench.cases import Case
from fade_kernels_triton.bench.timing import Timer, layers_for, terabytes

REPLAYS = 9

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``[B, H_q, Q, D]`` from a query of that shape and keys and values ``[B, H_kv, T, D]``."""

AttendMaker = Callable[[], Attend]
"""Makes an ``Attend`` for one shape; what it compiles it compiles when first called."""


@dataclass(frozen=True)
class Baseline:
    """bf16 attention of one shape.

    Attributes:
        shape: rows, context, heads and channels.
        nbytes: of keys and values.
        us: microseconds a layer by name, for those that ran.
        troubles: why others did not run, by name.
    """

    shape: str
    nbytes: int
    us: Mapping[str, float]
    troubles: Mapping[str, str]

    @property
    def best(self) -> str | None:
        """Name of the fastest; ``None`` if none ran."""
        return min(self.us, key=lambda name: self.us[name], default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        best = self.best
        tb_s = None if best is None else round(terabytes(self.nbytes, self.us[best]), 3)
        us = {name: round(time, 2) for name, time in self.us.items()}
        return {"shape": self.shape, "us": us, "best": best, "tb_s": tb_s, "did_not_run": dict(self.troubles)}


def _sdpa(backend: SDPBackend) -> Attend:
    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            grouped = query.shape[1] != keys.shape[1]
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)

    return attend


def _flex() -> Attend:
    """Flex decoding, autotuned by the compiler as the kernel's own launches are tuned."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # one shape's code at a time: the compiler gives up on a function that it sees in many
    compiled = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")

    def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        found: Tensor = compiled(query, keys, values, enable_gqa=query.shape[1] != keys.shape[1])
        return found

    return attend


CONTENDERS: Mapping[str, AttendMaker] = {
    "flash": lambda: _sdpa(SDPBackend.FLASH_ATTENTION),
    "cudnn": lambda: _sdpa(SDPBackend.CUDNN_ATTENTION),
    "flex": _flex,
}
"""The fastest of these is what ratios are against."""


def measure(
    case: Case, device: torch.device, timer: Timer, contenders: Mapping[str, AttendMaker] = CONTENDERS
) -> Baseline:
    """Time every contender on the shape of ``case``, each layer with buffers of its own."""
    shape = (case.rows, case.kv_heads, case.context + case.window, case.dim)
    nbytes = 2 * 2 * math.prod(shape)
    layers = layers_for(nbytes)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, dtype=torch.bfloat16)

    us, troubles = {}, {}
    try:
        query = normal(case.rows, case.heads, case.queries, case.dim)
        buffers = [(normal(*shape), normal(*shape)) for _ in range(layers)]
    except torch.OutOfMemoryError as error:
        return Baseline(case.shape, nbytes, {}, dict.fromkeys(contenders, f"out of memory: {first_line(error)}"))
    for name, make in contenders.items():
        try:
            attend = make()
            us[name] = timer([partial(attend, query, keys, values) for keys, values in buffers], REPLAYS)
        except Exception as error:  # noqa: BLE001 (what a backend raises says why it did not run, and is shown)
            troubles[name] = f"{type(error).__name__}: {first_line(error)}"
    return Baseline(case.shape, nbytes, us, troubles)


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line that an error has to say, cut to ``limit`` characters."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return line if len(line) <= limit else f"{line[:limit]}..."
