"""A case's tensors, random and encoded, as the kernel takes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fade_core import get_quantizer
from fade_core.errors import ConfigError
from fade_core.interfaces import Quantizer
from fade_core.packed import Packed, PackedFormat
from fade_kernels_triton.bench.calibrated import CalibratedProblem, build_calibrated
from fade_kernels_triton.bench.cases import Case
from fade_kernels_triton.decode import decode_attention
from fade_kernels_triton.launch import DecodeConfig
from fade_kernels_triton.operands import PackedTier, Window


@dataclass(frozen=True)
class UniformProblem:
    """A case of uniform codes: query ``[B, H_q, Q, D]``, one packed tier, and a window or none."""

    case: Case
    query: Tensor
    tier: PackedTier
    window: Window | None

    def run(self, config: DecodeConfig | None) -> Tensor:
        """Output ``[B, H_q, Q, D]`` of the kernel, launched as ``config`` says, or as a cache would launch it."""
        return decode_attention(self.query, [self.tier], self.window, config=config)[0]

    def again(self) -> UniformProblem:
        """The same problem in memory of its own, as another layer's."""
        tier, window = self.tier, self.window
        tier = replace(
            tier,
            keys={name: field.clone() for name, field in tier.keys.items()},
            values={name: field.clone() for name, field in tier.values.items()},
        )
        if window is not None:
            window = replace(window, keys=window.keys.clone(), values=window.values.clone())
        return UniformProblem(self.case, self.query.clone(), tier, window)

    def tokens(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[T, D]`` in float32 that one row and KV head attends to: dequantised, then the window's."""
        count = int(self.tier.count[row, head])
        sides = []
        for side, quantizer in zip((self.tier.keys, self.tier.values), quantizers(self.case), strict=True):
            if self.tier.table is None:
                fields = {name: field[row : row + 1, head : head + 1, :count] for name, field in side.items()}
            else:
                at = self.tier.table[row, head, :count].long()
                fields = {name: field[at][None, None] for name, field in side.items()}
            sides.append(quantizer.decode(Packed(fields, count * self.case.tile, torch.float32))[0, 0])
        if self.window is not None:
            kept = int(self.window.length[row])
            parts = (self.window.keys[row, head, :kept], self.window.values[row, head, :kept])
            sides = [torch.cat([side, part.float()]) for side, part in zip(sides, parts, strict=True)]
        return sides[0], sides[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the operands that a launch reads: codes, metadata, window."""
        fields = [*self.tier.keys.values(), *self.tier.values.values()]
        if self.window is not None:
            fields += [self.window.keys, self.window.values]
        return sum(field.numel() * field.element_size() for field in fields)


def quantizers(case: Case) -> tuple[Quantizer, Quantizer]:
    """Those of keys and values."""
    options = {"head_dim": case.dim, "tile": case.tile}
    keys = get_quantizer("uniform", side="key", axis=case.axis, bits=case.bits, **options)
    bits = case.value_bits or case.bits
    return keys, get_quantizer("uniform", side="value", axis="token", bits=bits, group=case.group, **options)


Problem = UniformProblem | CalibratedProblem


def build(case: Case, device: torch.device, seed: int) -> Problem:
    """Random keys about a mean a channel, random values; encoded row by row, which keeps temporaries small."""
    if case.calibrated:
        return build_calibrated(case, device, seed)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, generator=generator)

    shape = (1, case.kv_heads, case.context, case.dim)
    mean = normal(1, case.kv_heads, 1, case.dim)
    key_quantizer, value_quantizer = quantizers(case)
    encoded = [
        (key_quantizer.encode(normal(*shape) + mean).fields, value_quantizer.encode(normal(*shape)).fields)
        for _ in range(case.rows)
    ]
    keys, values = (
        {name: torch.cat([f[name] for f in side]) for name in side[0]} for side in zip(*encoded, strict=True)
    )
    tiles = case.context // case.tile
    count = torch.full((case.rows, case.kv_heads), tiles, dtype=torch.int32, device=device)
    if case.ragged:
        count.random_(tiles // 3, tiles + 1, generator=generator)
    table = None
    if case.table:
        order = torch.randperm(count.numel() * tiles, device=device, generator=generator)
        keys, values = ({name: f.flatten(0, 2)[order] for name, f in side.items()} for side in (keys, values))
        table = order.argsort().view(case.rows, case.kv_heads, tiles).int()
    tier = PackedTier(_format(key_quantizer), _format(value_quantizer), keys, values, count, table)
    query = normal(case.rows, case.heads, case.queries, case.dim) * case.query_scale
    window = None
    if case.window:
        pair = [normal(case.rows, case.kv_heads, case.window, case.dim).to(case.torch_dtype) for _ in range(2)]
        length = torch.full((case.rows,), case.window, dtype=torch.int32, device=device)
        window = Window(pair[0], pair[1], length)
    return UniformProblem(case, query.to(case.torch_dtype), tier, window)


def _format(quantizer: Quantizer) -> PackedFormat:
    if quantizer.format is None:
        raise ConfigError(f"the quantizer {quantizer.kind!r} of this fade-core has no packed format")
    return quantizer.format
