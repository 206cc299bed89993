"""``fade config``: show, validate, and describe configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fade_core.cli.console import complain, out, print_json, say
from fade_core.errors import FadeError

app = typer.Typer(help="Show, validate and describe configurations.", no_args_is_help=True)


@app.command()
def show(
    config: Annotated[str, typer.Argument(help="A preset (safe, balanced, aggressive) or a file.")] = "safe",
    format: Annotated[Literal["toml", "yaml", "json"], typer.Option(help="Format to print.")] = "toml",
) -> None:
    """Print a configuration with every default spelled out."""
    from fade_core.cache.named_caches import configuration
    from fade_core.config.files import render_table

    out.out(render_table(configuration(config).to_dict(), format), highlight=False, end="")


@app.command()
def validate(files: Annotated[list[Path], typer.Argument(help="Configuration files.")]) -> None:
    """Check configuration files; every problem of every file is named."""
    from fade_core.config import FadeConfig

    broken = 0
    for path in files:
        try:
            FadeConfig.from_file(path)
        except FadeError as error:
            broken += 1
            complain(f"error: {error}")
        else:
            say(f"{path}: valid")
    if broken:
        raise typer.Exit(2)


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File to write instead of stdout.")] = None,
) -> None:
    """Print the JSON Schema of configurations, with every component that is installed."""
    from fade_core.config import FadeConfig

    described: dict[str, Any] = FadeConfig.json_schema()
    if output is None:
        print_json(described)
    else:
        output.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        say(f"wrote {output}")
