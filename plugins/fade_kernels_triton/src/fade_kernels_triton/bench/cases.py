"""What is checked and timed: problems by rows, heads, context and format, each with a name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fade_core.errors import ConfigError
from fade_core.packed import Axis
from fade_kernels_triton.launch import LaunchCase


@dataclass(frozen=True)
class Case:
    """One decode problem.

    Attributes:
        rows, heads, kv_heads, dim: ``B``, ``H_q``, ``H_kv``, ``D``.
        context: packed tokens a row, a power of two.
        bits: width of codes, of the keys' where the values have ``value_bits``.
        axis: axis of the key scales; values have a scale a token, or a group of its channels.
        tile: tokens a tile.
        queries: query tokens a row.
        dtype: of query and window.
        window: full-precision tokens behind the packed ones.
        table: tiles lie shuffled in a pool.
        ragged: rows and heads hold from a third of the context to all of it.
        flat: queries so small that weights are nearly equal, where sums lose most.
        calibrated: codes are those of ``self-calibrated``; their channels have widths of their own, ``bits`` and a little on
            average; axis and launch configurations mean nothing to them.
        value_bits: width of the values' codes, 0 for ``bits``.
        group: channels of a value that share a scale, 0 for all.
    """

    rows: int
    heads: int
    kv_heads: int
    dim: int
    context: int
    bits: int = 4
    axis: Axis = "channel"
    tile: int = 64
    queries: int = 1
    dtype: str = "bfloat16"
    window: int = 0
    table: bool = False
    ragged: bool = False
    flat: bool = False
    calibrated: bool = False
    value_bits: int = 0
    group: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        """``dtype`` as torch's."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    @property
    def query_scale(self) -> float:
        """Standard deviation of the query."""
        return 0.05 if self.flat else 1.5

    @property
    def shape(self) -> str:
        """Rows, context, heads and channels: ``8x32768 32/8 d128``."""
        return f"{self.rows}x{self.context} {self.heads}/{self.kv_heads} d{self.dim}"

    @property
    def format(self) -> str:
        """Codes, axis of the key scales and tile: ``int4-channel-64``, ``int3/2g32-channel-64``, ``calibrated2-64``."""
        if self.calibrated:
            return f"calibrated{self.bits}-{self.tile}"
        values = f"/{self.value_bits}" * bool(self.value_bits) + f"g{self.group}" * bool(self.group)
        return f"int{self.bits}{values}-{self.axis}-{self.tile}"

    @property
    def name(self) -> str:
        """Shape, format, and what is unusual: ``3x4096 32/8 d128 int4-channel-64 window150 table ragged``."""
        unusual = [
            f"q{self.queries}" * (self.queries != 1),
            self.dtype * (self.dtype != "bfloat16"),
            f"window{self.window}" * bool(self.window),
            *(flag * bool(getattr(self, flag)) for flag in ("table", "ragged", "flat")),
        ]
        return " ".join([self.shape, self.format, *filter(None, unusual)])

    @property
    def launch(self) -> LaunchCase:
        """What launch configurations are looked up by."""
        columns = self.heads // self.kv_heads * self.queries
        bits = self.value_bits or self.bits
        return LaunchCase(bits, self.axis, self.tile, self.dim, columns, self.rows * self.kv_heads, self.context)

    @property
    def small(self) -> Case:
        """A problem of a few tiles that runs the same compiled code."""
        return replace(self, rows=1, context=4 * self.tile, ragged=False, flat=False)


PARITY = (
    Case(2, 32, 8, 128, 4096),
    Case(2, 32, 8, 128, 4096, axis="token"),
    Case(2, 32, 8, 128, 4096, bits=2),
    Case(2, 32, 8, 128, 4096, bits=2, tile=128),
    Case(2, 32, 8, 128, 4096, bits=2, axis="token", tile=128),
    Case(1, 32, 8, 128, 32768, flat=True),
    Case(1, 32, 8, 128, 32768, axis="token", flat=True),
    Case(1, 32, 8, 128, 32768, bits=2, tile=128, flat=True),
    Case(3, 32, 8, 128, 4096, window=150, table=True, ragged=True),
    Case(3, 32, 8, 128, 4096, bits=2, axis="token", window=150, table=True, ragged=True, dtype="float16"),
    Case(2, 32, 8, 128, 4096, window=70, queries=4),
    Case(2, 14, 2, 64, 4096, window=70),
    Case(2, 4, 1, 256, 4096, window=70, dtype="float16"),
    Case(2, 16, 1, 128, 4096, window=70),
    Case(2, 8, 8, 96, 4096, window=70),
    Case(2, 12, 3, 80, 4096, window=70),
    Case(2, 32, 8, 128, 4096, tile=128),
    Case(2, 32, 8, 128, 4096, bits=3, value_bits=2, group=32),
    Case(2, 32, 8, 128, 4096, bits=3, value_bits=2),
    Case(1, 32, 8, 128, 32768, bits=3, value_bits=2, tile=128, flat=True),
    Case(2, 32, 8, 128, 4096, bits=4, value_bits=2, window=70, table=True, ragged=True),
    Case(3, 14, 2, 64, 4096, bits=3, value_bits=2, group=32, window=70, table=True, ragged=True),
    Case(2, 32, 8, 128, 4096, bits=2, calibrated=True),
    Case(2, 32, 8, 128, 4096, bits=2, calibrated=True, tile=128),
    Case(1, 32, 8, 128, 32768, bits=2, calibrated=True, tile=128, flat=True),
)
"""Checked before anything is timed; a format with one red case is not timed at all."""

SHAPES = (
    Case(8, 32, 8, 128, 32768),
    Case(1, 32, 8, 128, 131072),
    Case(1, 32, 8, 128, 32768),
    Case(8, 32, 8, 128, 4096),
    Case(1, 32, 8, 128, 4096),
    Case(8, 14, 2, 64, 32768),
    Case(8, 4, 1, 256, 32768),
)


def variants(shape: Case) -> tuple[Case, ...]:
    """Formats that a shape is timed in: 4 bits, and at long contexts also 2, 3 bits beside 2, and calibrated codes."""
    codes: list[dict[str, Any]] = [{}]
    if shape.dim == 128 and shape.context >= 32768:
        codes += [{"bits": 2}, {"bits": 2, "calibrated": True}, {"bits": 3, "value_bits": 2}]
    found = [replace(shape, tile=tile, **fields) for fields in codes for tile in (64, 128)]
    if len(codes) > 1 and shape.rows > 1:
        found.append(replace(shape, bits=3, value_bits=2, group=32))
    return (*found, replace(shape, axis="token"))


TIMED = tuple(case for shape in SHAPES for case in variants(shape))
"""Every case that is timed, those of a shape side by side."""


def selected(only: str) -> tuple[Case, ...]:
    """The timed cases whose name holds ``only``; all where it is empty. Raises ``ConfigError`` if there is none."""
    found = tuple(case for case in TIMED if only in case.name)
    if not found:
        names = "\n".join(f"  {case.name}" for case in TIMED)
        raise ConfigError(f"--only {only!r}: no case has that in its name. The cases are\n{names}")
    return found


def checked(only: str) -> tuple[Case, ...]:
    """The parity cases: all, or where ``only`` selects cases those in their formats. Raises as ``selected``."""
    formats = {case.format for case in selected(only)}
    return tuple(case for case in PARITY if not only or case.format in formats)
