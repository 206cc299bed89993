"""Whether the kernel computes a case: its error beside that of bf16 attention, both against float64."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fade_kernels_triton.bench.problems import Problem
from fade_kernels_triton.launch import DecodeConfig
from fade_kernels_triton.parity import ALLOWED


@dataclass(frozen=True)
class Agreement:
    """Relative errors, ``|found - exact| / |exact|``, to float64 attention over the dequantised values.

    Attributes:
        error: of the kernel.
        reference: of bf16 attention over the same values.
        worst: largest ratio of the two among single query heads.
    """

    error: float
    reference: float
    worst: float

    @property
    def green(self) -> bool:
        """Whether the kernel's error is at most twice bf16's own; never where something is not finite."""
        return math.isfinite(self.reference) and self.error <= ALLOWED * self.reference


def agreement(problem: Problem, config: DecodeConfig | None) -> Agreement:
    """Run the kernel as ``config`` says and compare, one row and KV head at a time."""
    case = problem.case
    found = problem.run(config).double()
    exact, rounded = torch.empty_like(found), torch.empty_like(found)
    group = case.heads // case.kv_heads
    for row in range(case.rows):
        for head in range(case.kv_heads):
            keys, values = problem.tokens(row, head)
            heads = slice(head * group, (head + 1) * group)
            query = problem.query[row, heads]
            past = keys.shape[0] - (case.queries if case.window else 0)  # packed tokens come before all queries
            seen = torch.ones(case.queries, keys.shape[0], dtype=torch.bool, device=keys.device).tril(past)
            scores = query.double() @ keys.double().T * case.dim**-0.5
            exact[row, heads] = torch.softmax(scores.masked_fill(~seen, -math.inf), -1) @ values.double()
            rounded[row, heads] = F.scaled_dot_product_attention(
                query.bfloat16()[None],
                keys.bfloat16().expand(1, group, -1, -1),
                values.bfloat16().expand(1, group, -1, -1),
                attn_mask=None if case.queries == 1 else seen,
            )[0].double()
    mine, theirs = (_relative(x, exact, -1) for x in (found, rounded))
    worst = float((mine / theirs.clamp_min(1e-9)).max())
    return Agreement(float(_relative(found, exact)), float(_relative(rounded, exact)), _known(worst))


def _relative(found: Tensor, exact: Tensor, dim: int | None = None) -> Tensor:
    error: Tensor = (found - exact).norm(dim=dim) / exact.norm(dim=dim)
    return error.nan_to_num(nan=math.inf, posinf=math.inf)


def _known(value: float) -> float:
    return math.inf if math.isnan(value) else value
