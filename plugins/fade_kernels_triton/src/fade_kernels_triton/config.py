"""Launch configurations: how many warps, how deep a pipeline, how many programs share a multiprocessor."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
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


@cache
def _table() -> list[dict[str, object]]:
    rows: list[dict[str, object]] = json.loads(files(__package__).joinpath("configs.json").read_text())["decode"]
    return rows


def lookup(bits: int, axis: str, head_dim: int, columns: int, rows_and_heads: int, context: int) -> DecodeConfig:
    """The tuned configuration nearest to a case: same format if there is one, then nearest in size.

    Args:
        bits: width of the codes (of the largest tier).
        axis: axis of the key scales.
        head_dim: channels of a head.
        columns: query heads of a KV head times query tokens.
        rows_and_heads: ``B * H_kv``.
        context: tokens that the buffers can hold.
    """

    def distance(row: dict[str, object]) -> tuple[float, ...]:
        case = row["case"]
        assert isinstance(case, dict)
        work = rows_and_heads * context / (case["rows_and_heads"] * case["context"])
        return (
            float(case["bits"] != bits),
            abs(case["head_dim"] - head_dim),
            float((case["columns"] > 16) != (columns > 16)),
            float(case["axis"] != axis),
            max(work, 1 / work),
            max(rows_and_heads / case["rows_and_heads"], case["rows_and_heads"] / rows_and_heads),
        )

    rows = _table()
    if not rows:
        return DecodeConfig()
    return DecodeConfig(**min(rows, key=distance)["config"])  # type: ignore[arg-type]


def as_row(case: dict[str, object], config: DecodeConfig) -> dict[str, object]:
    """A row of ``configs.json``."""
    return {"case": case, "config": asdict(config)}
