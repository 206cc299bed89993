"""A case of calibrated codes, as a cache's layer attends to them: transforms of query and output are in its time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fade_core import PackedSegment, TileView, get_quantizer
from fade_core.errors import PluginError
from fade_core.interfaces import PromptView, Quantizer, Tier
from fade_core.packed import Packed
from fade_kernels_triton.bench.cases import Case
from fade_kernels_triton.kernel import TritonDecodeAttention
from fade_kernels_triton.launch import DecodeConfig

PROMPT = 1024
"""Tokens that the quantizers learn from."""

KIND = "self-calibrated"
EXTRA = 0.1
"""Bits an element beyond ``Case.bits``: gains, and a few wider channels."""

FALL = 0.97
"""Deviation of a direction of keys and values, of that of the one before it."""


@dataclass(frozen=True)
class CalibratedProblem:
    """Query ``[B, H_q, Q, D]`` and one tier whose channels have widths of their own."""

    case: Case
    query: Tensor
    view: TileView

    def run(self, config: DecodeConfig | None = None) -> Tensor:
        """Output ``[B, H_q, Q, D]``; there is nothing to configure."""
        segment = PackedSegment(self.view, None, plain=True)
        output: Tensor = TritonDecodeAttention()(self.query, [segment], self.case.dim**-0.5).output
        return output

    def again(self) -> CalibratedProblem:
        """The same problem in memory of its own, as another layer's; the transforms are shared."""
        fields = {name: field.clone() for name, field in self.view.fields.items()}
        view = _in_order(self.case, self.view.tier, fields, self.view.used.clone())
        return CalibratedProblem(self.case, self.query.clone(), view)

    def tokens(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[T, D]`` in float32 that one row and KV head attends to."""
        tier, whole = self.view.tier, self.view.packed()
        keys, values = (
            quantizer.decode(Packed({n: f[row : row + 1] for n, f in side.fields.items()}, side.length, torch.float32))
            for quantizer, side in zip((tier.keys, tier.values), whole, strict=True)
        )  # [1, H_kv, T, D]
        return keys[0, head], values[0, head]

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and gains."""
        return sum(field.numel() * field.element_size() for field in self.view.fields.values())


def unavailable(case: Case) -> str:
    """Why ``case`` cannot be made here; empty if it can."""
    if not case.calibrated:
        return ""
    try:
        quantizer(case, "key", torch.device("cpu"))
    except PluginError as error:
        return str(error)
    return ""


def quantizer(case: Case, side: str, device: torch.device) -> Quantizer:
    """A quantizer of ``KIND`` in the widths that the kernel reads. Raises ``PluginError`` where none brings it."""
    options = {
        "bits": case.bits + EXTRA,
        "widths": [0, 2, 4, 6, 8],
        "tile": case.tile,
        "num_kv_heads": case.kv_heads,
        "levels": "uniform",
    }
    found: Quantizer = get_quantizer(KIND, head_dim=case.dim, side=side, device=device, **options)
    return found


def build_calibrated(case: Case, device: torch.device, seed: int) -> CalibratedProblem:
    """Random keys about a mean and random values, most of them along few directions; heads differ."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    size = FALL ** torch.arange(case.dim, device=device)
    turns = [torch.linalg.qr(normal(case.kv_heads, case.dim, case.dim))[0] for _ in range(2)]
    mean = normal(1, case.kv_heads, 1, case.dim)

    def drawn(length: int) -> tuple[Tensor, Tensor]:
        keys, values = (normal(1, case.kv_heads, length, case.dim) * size @ turn for turn in turns)
        return keys + mean, values

    sides = [quantizer(case, side, device) for side in ("key", "value")]
    keys, values = drawn(PROMPT)
    module = torch.nn.Module()
    module.o_proj = torch.nn.Linear(case.heads * case.dim, case.heads * case.dim, bias=False, device=device)
    causal = torch.ones(PROMPT, PROMPT, dtype=torch.bool, device=device).tril()
    prompt = PromptView(
        queries=normal(1, case.heads, PROMPT, case.dim),
        keys=keys,
        values=values,
        scaling=case.dim**-0.5,
        softcap=None,
        sink_logits=None,
        visible=lambda queries: causal[queries][None, None],
        module=module,
    )
    for side in sides:
        side.observe(prompt)
    encoded = [
        [side.encode(tokens).fields for side, tokens in zip(sides, drawn(case.context), strict=True)]
        for _ in range(case.rows)
    ]
    fields = {
        f"{side}.{name}": torch.cat([row[i][name] for row in encoded]).flatten(0, 2)  # [B * H_kv * T, ...]
        for i, side in enumerate("kv")
        for name in encoded[0][i]
    }
    used = torch.full((case.rows, case.kv_heads), case.context // case.tile, dtype=torch.int32, device=device)
    query = normal(case.rows, case.heads, case.queries, case.dim) * case.query_scale
    view = _in_order(case, Tier("calibrated", "rest", *sides), fields, used)
    return CalibratedProblem(case, query.to(case.torch_dtype), view)


def _in_order(case: Case, tier: Tier, fields: dict[str, Tensor], used: Tensor) -> TileView:
    """Tiles ``[B * H_kv * T, ...]`` that lie one after the other, all of them in use."""
    shape = (case.rows, case.kv_heads, case.context // case.tile)
    ids = torch.arange(math.prod(shape), dtype=torch.int32, device=used.device).view(shape)
    return TileView(tier, fields, ids, used, None, True, case.torch_dtype, ids.shape[2], even=True)
