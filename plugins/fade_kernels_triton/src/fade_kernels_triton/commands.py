"""``fade check-kernels``: do the Triton kernels compute the right thing on this machine."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def check_kernels_command(
    device: Annotated[str | None, typer.Option(help="Where to run; default: the GPU, or the CPU interpreted.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the inputs; default: drawn and printed.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check the fused kernels against float64 attention over the dequantised values, and the other ops against the core's."""
    from fade_kernels_triton.parity import check_fused_parity, check_ops

    report = check_fused_parity(device, seed)
    ops = check_ops(device, report.seed)
    if json:
        found = {op: [asdict(check) for check in checks] for op, checks in ops.items()}
        typer.echo(jsonlib.dumps({**report.to_dict(), "ops": found}, indent=2))
    else:
        table = Table("case", "error", "bf16's own", "result", title=f"{report.device} (seed {report.seed})")
        for case in report.cases:
            table.add_row(case.case, f"{case.error:.1e}", f"{case.reference:.1e}", _word(case.passed))
        Console().print(table)
        table = Table("op", "check", "result", "what was found")
        for op, checks in ops.items():
            for check in checks:
                if check.outcome != "not applicable":
                    table.add_row(op, check.name, _word(check.passed), "" if check.passed else check.message)
        Console().print(table)
    if not report.ok or not all(check.passed for checks in ops.values() for check in checks):
        raise typer.Exit(1)


def _word(passed: bool) -> str:
    return "[green]passed[/]" if passed else "[red]failed[/]"
