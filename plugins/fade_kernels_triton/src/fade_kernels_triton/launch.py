"""Launch configurations: how many warps, how deep a pipeline, how many programs share a multiprocessor."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DecodeConfig:
    """How ``decode_attention`` is launched.

    Attributes:
        warps: warps a program.
        stages: software pipeline depth of the packed loop.
        resident: programs a multiprocessor that the number of splits aims at.
        overlap: let each launch start before the one before it ends, and wait for it on the device (needs compute
            capability 9).
        registers: most registers a thread may take; 0 leaves it to the compiler.
        subnormal: feed codes to the tensor cores as fp16 subnormals, one instruction a pair less than normal numbers.
    """

    warps: int = 1
    stages: int = 3
    resident: int = 8
    overlap: bool = False
    registers: int = 0
    subnormal: bool = True


@dataclass(frozen=True)
class LaunchCase:
    """What a configuration was tuned for.

    Attributes:
        bits: width of the values' codes (of the first tier); the keys' are as wide or wider.
        axis: axis of the key scales.
        tile: tokens a tile.
        head_dim: channels of a head.
        columns: query heads of a KV head times query tokens.
        rows_and_heads: ``B * H_kv``.
        context: tokens that the buffers can hold.
    """

    bits: int
    axis: str
    tile: int
    head_dim: int
    columns: int
    rows_and_heads: int
    context: int

    def format_distance(self, other: LaunchCase) -> tuple[float, ...]:
        """How far the code that is compiled for ``other`` is from this case's; compared from left to right."""
        return (
            float(self.bits != other.bits),
            abs(self.head_dim - other.head_dim),
            float((self.columns > 16) != (other.columns > 16)),
            float(self.tile != other.tile),
            float(self.axis != other.axis),
        )

    def size_distance(self, other: LaunchCase) -> tuple[float, ...]:
        """How far the work of ``other`` is from this case's; compared from left to right."""
        work = self.rows_and_heads * self.context / (other.rows_and_heads * other.context)
        groups = self.rows_and_heads / other.rows_and_heads
        return max(work, 1 / work), max(groups, 1 / groups)
