"""``fade check``: the conformance kit on one component."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from fade_core.cli.console import out, print_json, table, working
from fade_core.cli.options import Json


def check(
    component: Annotated[str, typer.Argument(help="KIND:NAME, such as policies:h2o or quantizers:uniform.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="For rope: the model whose config is used.")
    ] = None,
    fields: Annotated[
        list[str] | None, typer.Option("--set", help="FIELD=VALUE of its configuration; may be given several times.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the inputs; default: drawn and printed.")] = None,
    json: Json = False,
) -> None:
    """Check a quantizer, policy, RoPE scheme, kernel or telemetry sink against its interface."""
    from fade_core.testing import check_component
    from fade_core.testing.component import read_fields

    chosen = read_fields(fields or [])
    with working(f"checking {component}") as advance:
        report = check_component(component, fields=chosen, seed=seed, model=model, progress=advance)
    if json:
        print_json(report.to_dict())
    else:
        made = table(f"{component} (seed {report.seed})", "check", "result", "message")
        for result in report.results:
            colour = {"passed": "green", "failed": "red"}.get(result.outcome, "yellow")
            made.add_row(escape(result.name), f"[{colour}]{result.outcome}[/]", escape(result.message))
        out.print(made)
    if not report.ok:
        raise typer.Exit(1)
