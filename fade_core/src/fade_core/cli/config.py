"""``fade config``: show, validate, and describe configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fade_core.cli.console import complain, out, print_json, say, table
from fade_core.cli.options import Json
from fade_core.errors import FadeError

if TYPE_CHECKING:
    from fade_core.config import FadeConfig

HEAD_DIM = 128
"""Of the heads that ``fade config list`` counts bits for."""

app = typer.Typer(help="Show, validate and describe configurations.", no_args_is_help=True)


@app.command()
def show(
    config: Annotated[str, typer.Argument(help="A preset (`fade config list`) or a file.")] = "safe",
    format: Annotated[Literal["toml", "yaml", "json"], typer.Option(help="Format to print.")] = "toml",
) -> None:
    """Print a configuration with every default spelled out."""
    from fade_core.cache.named_caches import configuration
    from fade_core.config.files import render_table

    out.out(render_table(configuration(config).to_dict(), format), highlight=False, end="")


@app.command(name="list")
def list_presets(json: Json = False) -> None:
    """List the presets that are installed: what each stores, what reads it quickly, where it was measured."""
    from fade_core.config import FadeConfig
    from fade_core.plugins import default_registry

    found = []
    for name, preset in sorted(default_registry().all("presets").items()):
        config = FadeConfig.preset(name)
        found.append(
            {
                "name": name,
                "bits": stored_bits(config),
                "keeps": "all" if config.policy.budget is None else f"{config.policy.budget} ({config.policy.kind})",
                "summary": preset.summary,
                "speed": preset.speed,
                "measured": preset.measured,
            }
        )
    if json:
        print_json({"presets": found, "head_dim": HEAD_DIM})
        return
    made = table("presets", "name", "bits", "keeps", "what it is", "fast", "measured")
    for one in found:
        made.add_row(
            str(one["name"]), f"{one['bits']:.2f}", *(str(one[n]) for n in ("keeps", "summary", "speed", "measured"))
        )
    out.print(made)


def stored_bits(config: FadeConfig) -> float:
    """Bits an element of a packed token, metadata counted, keys and values alike, of a head of ``HEAD_DIM`` channels."""
    from fade_core.interfaces import QuantizerContext

    keys = config.keys.build(QuantizerContext(HEAD_DIM, "key", config.tile))
    values = config.values.build(QuantizerContext(HEAD_DIM, "value", config.tile))
    return (keys.bits_per_element + values.bits_per_element) / 2


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
