"""Whether the fused kernel computes what attention over the dequantised values computes, on this machine."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fade_core import get_quantizer
from fade_core.errors import ConfigError
from fade_core.packed import Axis
from fade_core.testing import CheckResult, check_kernel
from fade_kernels_triton.decode import decode_attention
from fade_kernels_triton.device import unusable
from fade_kernels_triton.operands import PackedTier
from fade_kernels_triton.sdpa import dequantized

ALLOWED = 2.0
"""The kernel's error may be this many times that of bf16 attention over the same values."""


@dataclass(frozen=True)
class Parity:
    """One problem: the kernel beside bf16 attention, both against float64 over the dequantised values.

    Attributes:
        case: format and shape.
        error: relative error of the kernel, ``|found - exact| / |exact|``.
        reference: relative error of bf16 attention over the same values.
        passed: ``error <= 2 * reference``.
    """

    case: str
    error: float
    reference: float
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """What ``check_fused_parity`` found.

    Attributes:
        device: name of the GPU, or "Triton's interpreter".
        seed: of the inputs.
        cases: one result a problem.
    """

    device: str
    seed: int
    cases: tuple[Parity, ...]

    @property
    def ok(self) -> bool:
        """Whether every case passed."""
        return all(case.passed for case in self.cases)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


@dataclass(frozen=True)
class _Problem:
    bits: int
    axis: Axis
    tile: int
    dim: int
    heads: int
    kv_heads: int
    queries: int = 1
    tiles: int = 3
    flat: bool = False

    def __str__(self) -> str:
        kind = f"int{self.bits}, key scales a {self.axis}, tile {self.tile}"
        what = f"{self.queries} x {self.heads}/{self.kv_heads} heads, D {self.dim}, {self.tiles * self.tile} tokens"
        return f"{kind}: {what}{', flat' if self.flat else ''}"


PROBLEMS = (
    _Problem(4, "channel", 64, 128, 8, 2),
    _Problem(4, "token", 64, 128, 8, 2),
    _Problem(2, "channel", 128, 128, 8, 2),
    _Problem(2, "token", 64, 128, 8, 2),
    _Problem(4, "channel", 64, 64, 7, 1, queries=4),
    _Problem(4, "channel", 64, 256, 4, 1),
)
LONG = (
    _Problem(4, "channel", 64, 128, 8, 2, tiles=512, flat=True),
    _Problem(2, "channel", 128, 128, 8, 2, tiles=256, flat=True),
)
"""Nearly equal weights over 32,768 tokens, where sums lose what short problems do not show; on a GPU only."""


def check_fused_parity(
    device: torch.device | str | None = None,
    seed: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ParityReport:
    """Run the decode kernel on random problems and compare it with float64 attention over the dequantised values.

    Args:
        device: where to run; ``None`` takes the GPU if there is one, else the CPU (with ``TRITON_INTERPRET=1``).
        seed: of the inputs; ``None`` draws one.
        progress: called with the problems done and the problems in all.

    Raises:
        ConfigError: where Triton kernels cannot run, with the reason.
    """
    where = torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := unusable(where):
        raise ConfigError(
            f"the Triton kernels cannot be checked on {where}: {reason}. Run this on a machine with a CUDA device, or "
            f"set TRITON_INTERPRET=1 to have Triton interpret them on the CPU (slowly)"
        )
    seed = secrets.randbelow(2**31) if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    problems = PROBLEMS + LONG if where.type == "cuda" else PROBLEMS
    found = []
    for done, problem in enumerate(problems):
        if progress is not None:
            progress(done, len(problems))
        found.append(_compare(problem, where, generator))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else "Triton's interpreter"
    return ParityReport(name, seed, tuple(found))


def check_ops(device: torch.device | str | None = None, seed: int | None = None) -> dict[str, list[CheckResult]]:
    """Run the core's conformance checks on the kernels of the other ops, in bfloat16; by op.

    Args:
        device: as ``check_fused_parity``.
        seed: of the inputs.
    """
    from fade_kernels_triton.append import TritonAppend
    from fade_kernels_triton.dequantize import TritonDequantize
    from fade_kernels_triton.encode import TritonEncode
    from fade_kernels_triton.mass import TritonAttentionMass

    kernels = (TritonAppend(), TritonEncode(), TritonDequantize(), TritonAttentionMass())
    return {kernel.op: check_kernel(kernel, device=device, dtype=torch.bfloat16, seed=seed) for kernel in kernels}


def _compare(problem: _Problem, device: torch.device, generator: torch.Generator) -> Parity:
    shape = (1, problem.kv_heads, problem.tiles * problem.tile, problem.dim)
    channels = torch.randn(1, problem.kv_heads, 1, problem.dim, generator=generator)
    keys = (torch.randn(shape, generator=generator) + 2 * channels).to(device)
    values = torch.randn(shape, generator=generator).to(device)
    query = torch.randn(1, problem.heads, problem.queries, problem.dim, generator=generator).to(device).bfloat16()
    query = query * 0.05 if problem.flat else query
    options = {"head_dim": problem.dim, "bits": problem.bits, "tile": problem.tile}
    key_codes = get_quantizer("uniform", side="key", axis=problem.axis, **options)
    value_codes = get_quantizer("uniform", side="value", axis="token", **options)
    if key_codes.format is None or value_codes.format is None:
        raise ConfigError("the uniform quantizer of this fade-core has no packed format")
    packed_k, packed_v = key_codes.encode(keys).fields, value_codes.encode(values).fields
    count = torch.full(shape[:2], problem.tiles, dtype=torch.int32, device=device)
    tier = PackedTier(key_codes.format, value_codes.format, packed_k, packed_v, count)
    codes = f"codes{problem.bits}"
    exact_k = dequantized(packed_k[codes], packed_k["meta"], key_codes.format, torch.float64)
    exact_v = dequantized(packed_v[codes], packed_v["meta"], value_codes.format, torch.float64)
    exact = _attend(query, exact_k, exact_v)
    rounded = _attend(query, exact_k.bfloat16(), exact_v.bfloat16())
    error = _relative(decode_attention(query, [tier])[0], exact)
    reference = _relative(rounded, exact)
    return Parity(str(problem), error, reference, error <= ALLOWED * reference)


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """torch's own attention in the dtype of ``keys``."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    return torch.nn.functional.scaled_dot_product_attention(query.to(keys.dtype), keys, values)


def _relative(found: Tensor, exact: Tensor) -> float:
    error = float((found.double() - exact).norm() / exact.norm())
    return float("inf") if math.isnan(error) else error
