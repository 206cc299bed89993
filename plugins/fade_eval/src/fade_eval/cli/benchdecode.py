"""``fade bench decode``: a decode step inside ``generate``, compiled and not, beside transformers' own caches."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fade_core.cli.console import complain, errors, print_json, rows, say, show_figures, size, table, working
from fade_core.cli.options import Caches, Device, Json, named_caches
from fade_eval.cli.decoderecord import FILE, Record
from fade_eval.shapes import SHAPES, dtype_of

if TYPE_CHECKING:
    from fade_core import FadeConfig
    from fade_eval.generating import Comparison, GenerateTime

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

CPU = "CPU"

Shape = Annotated[
    list[str],
    typer.Option(help=f"Model shape, with random weights: {', '.join(SHAPES)}; may be given several times."),
]
Batch = Annotated[list[int], typer.Option(min=1, help="Rows; may be given several times.")]
Context = Annotated[list[int], typer.Option(min=1, help="Tokens of the prompt; may be given several times.")]


def decode(
    shape: Shape = ["llama-3.1-8b"],  # noqa: B006
    batch: Batch = [1],  # noqa: B006
    context: Context = [4096],  # noqa: B006
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of the compiled caches.")] = 160,
    warmup: Annotated[int, typer.Option(min=1, help="Steps before them, in which graphs are compiled.")] = 32,
    config: Caches = ["safe"],  # noqa: B006
    kernel: Annotated[str, typer.Option(help="Implementation of every op: auto, torch, triton.")] = "auto",
    loop: Annotated[
        Literal["generate", "fade"],
        typer.Option(help="Who runs FADE's caches: generate, compiled, or FADE's own loop, which records steps."),
    ] = "generate",
    backend: Annotated[
        str | None, typer.Option(help="Of torch.compile; default: inductor on a GPU, aot_eager on a CPU.")
    ] = None,
    profile: Annotated[
        bool | None,
        typer.Option(help="Profile a few steps more, for the time that the GPU is busy; default: on a GPU."),
    ] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Seed of weights, prompt and text.")] = 0,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where decode.json and decode.png go; one that was interrupted is gone on with."),
    ] = None,
    json: Json = False,
) -> None:
    """Time generate() with DynamicCache, StaticCache and FADE's caches, where the compiled one passes its parity check.

    Random weights do not change what a step costs. Exit code 1: something was left out, or parity failed, and no time of that
    configuration was printed.
    """
    from fade_core import decode_loop
    from fade_core.models.loading import resolve_device
    from fade_eval.generating import free, generate_times
    from fade_eval.profiling import can_profile
    from fade_eval.shapes import check_shape, random_model

    where = resolve_device(device)
    for name in shape:
        check_shape(name, where)
    configs = _configs(config, kernel)
    profiled = can_profile(where) if profile is None else profile
    options: dict[str, Any] = {"steps": steps, "warmup": warmup, "backend": backend, "profile": profiled, "seed": seed}
    settings = {
        "shape": _each(shape),
        "batch": _each(batch),
        "context": _each(context),
        **options,
        "kernel": kernel,
        "loop": loop,
    }
    settings |= {"config": {name: one.to_dict() for name, one in configs.items()}, **_machine(where)}
    record = Record(settings, output_dir)
    own = functools.partial(decode_loop, record=True) if loop == "fade" else None
    model, made = None, ""
    try:
        for point in record.points:
            if record.missing_at(point):
                if made != point[0]:
                    model = None  # before there is another
                    free(where)
                    with working(f"making {point[0]}"):
                        model, made = random_model(point[0], where, seed), point[0]
                with working("{}, {} x {}".format(*point)) as advance:
                    generate_times(
                        model,
                        configs,
                        shape=point[0],
                        batch=point[1],
                        context=point[2],
                        known=record.found.get(point),
                        measured=record.add,
                        progress=advance,
                        custom_generate=own,
                        **options,
                    )
            if not json:
                show(record.found[point], settings)
    except KeyboardInterrupt as error:
        if not json and point in record.found:
            show(record.found[point], settings)
        _finish(record, json)
        again = f"; the same command goes on from {output_dir / FILE}" if output_dir is not None else ""
        complain(f"interrupted{again}")
        raise typer.Exit(INTERRUPTED) from error
    _finish(record, json)
    green = [one.green for found in record.found.values() for one in found.configs.values()]
    if not all(green) or record.missing():
        raise typer.Exit(1)


def _finish(record: Record, json: bool) -> None:
    """Name what is missing, draw what is there, and say where it is."""
    for line in record.missing():
        complain(f"missing: {line}")
    if json:
        print_json(record.to_dict())
    if record.path is None or not record.found:
        return
    found = [record.found[point] for point in record.points if point in record.found]
    draw(found, list(record.settings["config"]), describe(record.settings), record.path.with_name("decode.png"))
    complain(f"written: {record.path.parent}")


def _configs(names: list[str], kernel: str) -> dict[str, FadeConfig]:
    """The configurations by name, with the kernels that are wanted. Errors as ``named_caches``."""
    from fade_core.cache.named_caches import configuration

    return {
        name: configuration(one).with_overrides(kernel={"kind": kernel})  # type: ignore[arg-type]
        for name, one in named_caches(_each(names)).items()
    }


def _each(given: list[Any]) -> list[Any]:
    return list(dict.fromkeys(given))


def _machine(where: Any) -> dict[str, str]:
    """What times depend on beside the options."""
    import torch
    import transformers

    from fade_core import __version__

    found = torch.cuda.get_device_name(where) if where.type == "cuda" else CPU
    return {"machine": found, "torch": torch.__version__, "transformers": transformers.__version__, "fade": __version__}


def describe(settings: dict[str, Any]) -> str:
    """Circumstances of all figures, in a line."""
    return f"{settings['machine']}, torch {settings['torch']}, kernels {settings['kernel']}, {settings['steps']} steps"


def show(found: Comparison, settings: dict[str, Any]) -> None:
    """Print one comparison: parity of each configuration, then the times of those whose parity is green."""
    where = f"{found.shape}, {found.batch} x {found.context}"
    how = "recorded" if settings["loop"] == "fade" else "compiled"
    for name, one in found.configs.items():
        say(
            f"{where}: parity: {name}, {how}, {one.ours:.2e} from {name} as it is, StaticCache {found.theirs:.2e} from "
            f"DynamicCache"
        )
        if not one.green:
            errors.print(f"[red]{name}, {how}, computes something else: no time of it is worth printing[/]")
        elif one.graphs:
            errors.print(f"[yellow]{name}: {one.graphs} graphs were compiled during the timed steps[/]")
    if not found.times:
        return
    best = min(time.ms for time in found.times.values())
    profiled = settings["profile"]
    columns = ["cache", ">ms", *([">GPU busy"] if profiled else []), ">to best", ">mean", ">longest", ">prefill"]
    dtype = str(dtype_of(found.shape)).removeprefix("torch.")
    made = table(f"{where}, {dtype}: {describe(settings)}", *columns, ">warm-up s", ">held")
    show_figures(rows(made, [_line(name, time, best, profiled) for name, time in labelled(found).items()]))
    if not profiled and settings["machine"] == CPU:
        say("GPU-busy time is left out: there is no GPU to profile")
    elif profiled and any(time.busy_ms is None for time in found.times.values()):
        errors.print("[yellow]GPU-busy time is missing: the profiler saw no kernel (does CUPTI work here?)[/]")
    for name, time in labelled(found).items():
        if time.kernels:
            shares = ", ".join(f"{op} {share:.1%}" for op, share in time.shares.items())
            kernels = f"{name}: kernels of a step (append, attention): {time.kernels}"
            say(f"{kernels}; shares of its GPU time: {shares}" if shares else kernels)


def labelled(found: Comparison) -> dict[str, GenerateTime]:
    """All times by what tables and plots call them."""
    from fade_eval.generating import GROWING

    times = dict(found.times)
    for name, one in found.configs.items():
        times |= {f"{name}{cache.removeprefix(GROWING)}": time for cache, time in one.times.items()}
    return times


def _line(name: str, time: GenerateTime, best: float, profiled: bool) -> tuple[str, ...]:
    busy = ["-" if time.busy_ms is None else f"{time.busy_ms:.2f}"] if profiled else []
    times = f"{time.ms:.2f}", *busy, f"{time.ms / best:.2f}x", f"{time.ms_mean:.2f}", f"{time.ms_longest:.2f}"
    return name, *times, f"{time.prefill_ms:.0f}", f"{time.warmup_ms / 1000:.1f}", size(time.held_bytes)


def draw(found: list[Comparison], configs: list[str], title: str, path: Path) -> None:
    """Bars of the median step, a group for each shape, batch and context."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 0.6 * len(found) * (2 + 2 * len(configs)), 4), layout="constrained")
    axes = figure.subplots()
    times = [labelled(one) for one in found]
    names = list(dict.fromkeys(name for one in times for name in one))
    for number, name in enumerate(names):
        there = [(i, one[name].ms) for i, one in enumerate(times) if name in one]
        at = [i + (number - (len(names) - 1) / 2) / (len(names) + 1) for i, _ in there]
        axes.bar(at, [ms for _, ms in there], width=0.9 / (len(names) + 1), label=name)
    axes.set_xticks(range(len(found)), [f"{one.shape}\n{one.batch} x {one.context}" for one in found], fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("ms a step (median)")
    axes.set_title(title, fontsize=8)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)
