"""Launch configurations: how many warps, how deep a pipeline, how many programs share a multiprocessor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files


@dataclass(frozen=True)
class DecodeConfig:
    """How ``decode_attention`` is launched.

    Attributes:
        warps: warps a program.
        stages: software pipeline depth of the packed loop.
        resident: programs a multiprocessor that the number of splits aims at.
        fused: merge the parts in the same launch (best when a row and head has few splits).
        overlap: let the merge launch start before the decode launch ends (needs compute capability 9).
        registers: most registers a thread may take; 0 leaves it to the compiler.
        subnormal: feed codes to the tensor cores as fp16 subnormals, one instruction a pair less than normal numbers.
    """

    warps: int = 1
    stages: int = 3
    resident: int = 8
    fused: bool = False
    overlap: bool = False
    registers: int = 0
    subnormal: bool = True


@dataclass(frozen=True)
class Case:
    """What a configuration was tuned for.

    Attributes:
        bits: width of the codes (of the first tier).
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

    def distance(self, other: Case) -> tuple[float, ...]:
        """How little a configuration for ``other`` says about this case; compared from left to right."""
        work = self.rows_and_heads * self.context / (other.rows_and_heads * other.context)
        groups = self.rows_and_heads / other.rows_and_heads
        return (
            float(self.bits != other.bits),
            abs(self.head_dim - other.head_dim),
            float((self.columns > 16) != (other.columns > 16)),
            float(self.tile != other.tile),
            float(self.axis != other.axis),
            max(work, 1 / work),
            max(groups, 1 / groups),
        )


@cache
def tuned() -> tuple[tuple[Case, DecodeConfig], ...]:
    """The cases of ``configs.json`` and the fastest configuration found for each."""
    rows = json.loads(files(__package__).joinpath("configs.json").read_text(encoding="utf-8"))["decode"]
    return tuple((Case(**row["case"]), DecodeConfig(**row["config"])) for row in rows)


@lru_cache(maxsize=512)
def lookup(case: Case) -> DecodeConfig:
    """The tuned configuration nearest to ``case``: same format if there is one, then nearest in size."""
    return min(tuned(), key=lambda row: case.distance(row[0]), default=(case, DecodeConfig()))[1]
