"""``fade bench batch``: how many rows of a context fit in memory while ``generate`` decodes them."""

from __future__ import annotations

from typing import Annotated

import typer

from fade_core.cli.console import out, print_json, rows, size, table, working
from fade_core.cli.options import Cache, Device, Json
from fade_eval.shapes import SHAPES


def batch(
    shape: Annotated[
        str, typer.Option(help=f"Model shape, with random weights: {', '.join(SHAPES)}.")
    ] = "llama-3.1-8b",
    context: Annotated[int, typer.Option(min=1, help="Tokens a row at the end.")] = 32_768,
    limit: Annotated[float, typer.Option(min=0.0, help="Memory in GB (1e9 bytes), weights included.")] = 130.0,
    steps: Annotated[int, typer.Option(min=1, help="Steps that a batch decodes.")] = 4,
    config: Cache = "safe",
    kernel: Annotated[str, typer.Option(help="Implementation of every op: auto, torch, triton.")] = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Find the largest batch that decodes within a limit, with StaticCache and with FADE's compiled cache."""
    from fade_core.cache.named_caches import configuration
    from fade_core.models.loading import resolve_device
    from fade_eval.batches import largest_batches
    from fade_eval.shapes import random_model

    where = resolve_device(device)
    chosen = configuration(config).with_overrides(kernel={"kind": kernel})
    with working(f"making {shape}"):
        model = random_model(shape, where)
    with working(f"batches of {context} tokens") as advance:
        found = largest_batches(model, chosen, context=context, limit=int(limit * 1e9), steps=steps, progress=advance)
    if json:
        print_json({"context": context, "limit": int(limit * 1e9), "results": [one.to_dict() for one in found]})
        return
    base = found[0].rows
    lines = []
    for one in found:
        sizes = size(one.bytes), size(one.held_bytes), size(one.row_bytes)
        lines.append((one.cache, str(one.rows), f"{one.rows / base:.2f}x" if base else "-", *sizes))
    columns = ("cache", ">rows", ">to StaticCache", ">in all", ">cache", ">a row")
    out.print(rows(table(f"{shape}, {context} tokens a row, {config}, {limit:g} GB", *columns), lines))
