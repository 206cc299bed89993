"""What this distribution registers with FADE. Triton itself is imported when a kernel first runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fade_core import hookimpl

if TYPE_CHECKING:
    import typer

    from fade_core.interfaces import Kernel


@hookimpl
def fade_kernels() -> Sequence[type[Kernel]]:
    from fade_kernels_triton.append import TritonAppend
    from fade_kernels_triton.dequantize import TritonDequantize
    from fade_kernels_triton.encode import TritonEncode
    from fade_kernels_triton.kernel import TritonDecodeAttention
    from fade_kernels_triton.mass import TritonAttentionMass

    return [TritonDecodeAttention, TritonAttentionMass, TritonAppend, TritonEncode, TritonDequantize]


@hookimpl
def fade_commands(app: typer.Typer) -> None:
    from fade_kernels_triton.bench.commands import group
    from fade_kernels_triton.commands import check_kernels_command

    app.command("check-kernels")(check_kernels_command)
    app.add_typer(group(), name="bench")
