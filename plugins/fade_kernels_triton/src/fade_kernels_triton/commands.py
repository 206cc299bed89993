"""``fade check-kernels``: do the Triton kernels compute the right thing on this machine."""

from __future__ import annotations

import json as jsonlib
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def check_kernels_command(
    device: Annotated[str | None, typer.Option(help="Where to run; default: the GPU, or the CPU interpreted.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the inputs; default: drawn and printed.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the fused kernels against float64 attention over the dequantised values."""
    from fade_kernels_triton.parity import check_fused_parity

    report = check_fused_parity(device, seed)
    if json:
        typer.echo(jsonlib.dumps(report.to_dict(), indent=2))
    else:
        table = Table("case", "error", "bf16's own", "result", title=f"{report.device} (seed {report.seed})")
        for case in report.cases:
            colour, word = ("green", "passed") if case.passed else ("red", "failed")
            table.add_row(case.case, f"{case.error:.1e}", f"{case.reference:.1e}", f"[{colour}]{word}[/]")
        Console().print(table)
    if not report.ok:
        raise typer.Exit(1)
