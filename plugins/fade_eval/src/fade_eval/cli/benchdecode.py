"""``fade bench decode``: a decode step inside ``generate``, compiled and not, beside transformers' own caches."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fade_core.cli.console import complain, errors, print_json, rows, say, show_figures, size, table, working
from fade_core.cli.options import Cache, Device, Json

if TYPE_CHECKING:
    from fade_eval.generating import Comparison

Batch = Annotated[list[int], typer.Option(min=1, help="Rows; may be given several times.")]
Context = Annotated[list[int], typer.Option(min=1, help="Tokens of the prompt; may be given several times.")]


def decode(
    shape: Annotated[str, typer.Option(help="Model shape, with random weights: llama-3.1-8b, tiny.")] = "llama-3.1-8b",
    batch: Batch = [1],  # noqa: B006
    context: Context = [4096],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of the compiled caches.")] = 160,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them, in which graphs are compiled.")] = 32,
    config: Cache = "safe",
    kernel: Annotated[str, typer.Option(help="Implementation of every op: auto, torch, triton.")] = "auto",
    backend: Annotated[
        str | None, typer.Option(help="Of torch.compile; default: inductor on a GPU, aot_eager on a CPU.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Run once more for the share of each op in a step.")
    ] = False,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of prompt and text.")] = 0,
    output_dir: Annotated[Path | None, typer.Option(help="Where decode.json and decode.png go.")] = None,
    json: Json = False,
) -> None:
    """Time generate() with DynamicCache, StaticCache and FADE's caches, where the compiled one passes its parity check.

    Random weights do not change what a step costs. Exit code 1: parity failed, and no time was printed.
    """
    import torch

    from fade_core.cache.named_caches import configuration
    from fade_core.models.loading import resolve_device
    from fade_eval.generating import generate_times, random_model

    where = resolve_device(device)
    settings = configuration(config)
    chosen = settings.with_overrides(kernel={"kind": kernel})
    dtype = torch.float32 if shape == "tiny" else torch.bfloat16
    with working(f"making {shape}"):
        model = random_model(shape, where, dtype)
    machine = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    title = f"{shape} on {machine}, torch {torch.__version__}, {dtype}, {config}, kernels {kernel}"
    found: list[Comparison] = []
    for count, tokens in ((b, c) for b in batch for c in context):
        try:
            with working(f"{count} x {tokens}") as advance:
                options = {"steps": steps, "warmup": warmup, "backend": backend, "profile": profile, "seed": seed}
                found.append(generate_times(model, chosen, batch=count, context=tokens, **options, progress=advance))  # type: ignore[arg-type]
        except torch.OutOfMemoryError as error:
            complain(f"left out: {count} x {tokens}: {str(error).partition('. ')[0]}")
            continue
        if not json:
            show(found[-1], title)
        if output_dir is not None:
            write(found, title, output_dir)
    if json:
        print_json(report(found, title))
    if output_dir is not None:
        complain(f"written: {output_dir}")
    if not all(one.green for one in found) or not found:
        raise typer.Exit(1)


def report(found: list[Comparison], title: str) -> dict[str, Any]:
    """What JSON holds."""
    return {"title": title, "results": [one.to_dict() for one in found]}


def write(found: list[Comparison], title: str, folder: Path) -> None:
    """``decode.json`` and, where something is green, ``decode.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "decode.json").write_text(jsonlib.dumps(report(found, title), indent=2) + "\n", encoding="utf-8")
    green = [one for one in found if one.green]
    if green:
        draw(green, title, folder / "decode.png")


def show(found: Comparison, title: str) -> None:
    """Print one comparison: parity, then times if it is green."""
    say(
        f"{found.batch} x {found.context}: parity: compiled FADE {found.ours:.2e} from growing FADE, StaticCache "
        f"{found.theirs:.2e} from DynamicCache"
    )
    if not found.green:
        errors.print("[red]the compiled cache computes something else: no time is worth printing[/]")
        return
    from fade_eval.generating import FIXED

    best = min(time.ms for name, time in found.times.items() if not name.startswith("FADE"))
    lines = [
        (
            name,
            f"{time.ms:.2f}",
            f"{time.ms / best:.2f}x",
            f"{time.ms_mean:.2f}",
            f"{time.prefill_ms:.0f}",
            f"{time.warmup_ms / 1000:.1f}",
            size(time.held_bytes),
        )
        for name, time in found.times.items()
    ]
    columns = ("cache", ">ms", ">to best", ">mean", ">prefill", ">warm-up s", ">held")
    show_figures(rows(table(f"{title}: {found.batch} x {found.context}, {found.steps} steps", *columns), lines))
    say(f"kernels of the compiled step (append, attention): {found.times[FIXED].kernels}")
    if found.graphs:
        errors.print(f"[yellow]{found.graphs} graphs were compiled during the timed steps[/]")
    if found.shares:
        say("GPU time of a step: " + ", ".join(f"{op} {share:.1%}" for op, share in found.shares.items()))


def draw(found: list[Comparison], title: str, path: Path) -> None:
    """Bars of the median step, a group for each batch and context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.4 + 2.2 * len(found), 4), layout="constrained")
    axes = figure.subplots()
    names = list(found[0].times)
    for number, name in enumerate(names):
        at = [i + (number - (len(names) - 1) / 2) / (len(names) + 1) for i in range(len(found))]
        heights = [one.times[name].ms for one in found]
        axes.bar(at, heights, width=0.9 / (len(names) + 1), label=name)
    axes.set_xticks(range(len(found)), [f"{one.batch} x {one.context}" for one in found])
    axes.set_yscale("log")
    axes.set_ylabel("ms a step (median)")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
