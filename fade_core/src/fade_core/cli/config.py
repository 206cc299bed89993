"""``fade config``: show, validate, and describe configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fade_core.cli.console import complain, out, print_json, rows, say, table
from fade_core.cli.options import Json
from fade_core.errors import FadeError

if TYPE_CHECKING:
    from fade_core.config import FadeConfig
    from fade_core.interfaces import Preset

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
    """List the presets that are installed: what each stores, how fast it is, what reads it here, where it was measured."""
    from fade_core.plugins import default_registry

    found = [described(preset) for _, preset in sorted(default_registry().all("presets").items())]
    if json:
        print_json({"presets": found, "head_dim": HEAD_DIM})
        return
    columns = ("name", ">bits", "keeps", "what it is", "read here by", "fast", "measured")
    lines = []
    for one in found:
        bits = ", ".join(f"{tier['bits']:.2f}" for tier in one["tiers"])
        texts = (one[name] or "-" for name in ("keeps", "summary", "kernel", "speed", "measured"))
        lines.append((one["name"], bits or "-", *texts))
        if one["refused"]:
            complain(f"{one['name']} cannot be used here: {one['refused']}")
    out.print(rows(table(f"presets; bits of heads of {HEAD_DIM} channels", *columns), lines))


def described(preset: Preset) -> dict[str, Any]:
    """What ``fade config list`` tells of a preset, for heads of ``HEAD_DIM`` channels and the device that models would go to.

    ``bits`` counts those of a packed element, metadata included, keys and values alike (``None`` where ``tiers`` are several,
    of which a context decides how much each holds). ``kernel`` is what reads the finest tier in decode; "torch" is the
    reference, which is right and not fast. ``refused`` says why the configuration cannot be built here, or is empty.
    """
    from fade_core.config import FadeConfig

    about = {"name": preset.name, "summary": preset.summary, "speed": preset.speed, "measured": preset.measured}
    try:
        config = FadeConfig.preset(preset.name)
        tiers, kernel = _tiers(config)
    except FadeError as error:
        return about | {"bits": None, "tiers": [], "keeps": "", "kernel": "", "refused": str(error)}
    keeps = "all" if config.policy.budget is None else f"{config.policy.budget} ({config.policy.kind})"
    bits = tiers[0]["bits"] if len(tiers) == 1 else None
    return about | {"bits": bits, "tiers": tiers, "keeps": keeps, "kernel": kernel, "refused": ""}


def _tiers(config: FadeConfig) -> tuple[list[dict[str, Any]], str]:
    """Names and bits of the packed tiers, finest first, and the implementation that reads the first of them."""
    import torch

    from fade_core.config.kernel_selection import choose_kernel
    from fade_core.interfaces import QuantizerContext
    from fade_core.models.loading import resolve_device

    device = resolve_device("auto")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tiers: list[dict[str, Any]] = []
    kernel = ""
    for rung in config.resolved_ladder():
        keys = rung.keys.build(QuantizerContext(HEAD_DIM, "key", config.tile))
        values = rung.values.build(QuantizerContext(HEAD_DIM, "value", config.tile))
        kernel = (
            kernel or choose_kernel("decode_attention", config.kernel, keys.format, HEAD_DIM, device, dtype)[0].name
        )
        tiers.append({"tier": rung.name, "bits": (keys.bits_per_element + values.bits_per_element) / 2})
    return tiers, kernel


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
