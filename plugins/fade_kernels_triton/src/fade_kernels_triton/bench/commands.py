"""``fade bench kernels`` and ``fade bench tune`` on the command line."""

from __future__ import annotations

import json as jsonlib
import multiprocessing
import secrets
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    import torch

    from fade_kernels_triton.bench.report import Machine, TimingReport
    from fade_kernels_triton.bench.session import Session, Watch

Only = Annotated[str, typer.Option(help='Take the cases that have this in their name, such as "8x32768" or "int2".')]
Seconds = Annotated[
    float | None,
    typer.Option("--budget", min=0, help="Seconds after which nothing new begins; what is left out is named."),
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Processes that compile ahead; default: one a core, up to 14.")
]
Device = Annotated[str, typer.Option(help="cuda, cuda:1, ...")]
Seed = Annotated[int | None, typer.Option(help="Seed of the inputs; default: drawn and printed.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def group() -> typer.Typer:
    """Both commands, for ``fade bench`` to take over."""
    app = typer.Typer()
    app.command("kernels")(kernels)
    app.command("tune")(tune)
    return app


def kernels(
    only: Only = "",
    budget: Seconds = None,
    workers: Workers = None,
    device: Device = "cuda",
    seed: Seed = None,
    output_dir: Annotated[Path | None, typer.Option(help="Where kernels.json and kernels.png go.")] = None,
    json: Json = False,
) -> None:
    """Time the decode kernel beside torch's flash, cuDNN and flex attention in bf16, where its parity is green.

    Parity comes first, to float64 attention over the dequantised values. A time is that of one layer in a CUDA graph
    over many, each with buffers of its own, so that nothing is found in the L2 cache. Tiles lie one after the other, and
    once more shuffled in a pool, read through a table. Exit code 1: parity was red,
    something failed or nothing was timed.
    """
    from fade_kernels_triton.bench.calibrated import unavailable
    from fade_kernels_triton.bench.cases import checked, selected
    from fade_kernels_triton.bench.compiling import compile_ahead
    from fade_kernels_triton.bench.report import TimingReport
    from fade_kernels_triton.bench.session import check_formats, time_kernels, ways
    from fade_kernels_triton.bench.tables import show_rest, show_timings
    from fade_kernels_triton.config import lookup
    from fade_kernels_triton.launch import DecodeConfig

    where = usable(device)
    cases, parity = selected(only), checked(only)
    launches = [
        (replace(case, table=table), lookup(case.launch, where))
        for case in cases
        if not case.calibrated
        for table in (False, True)
    ]
    launches += [(case, DecodeConfig()) for case in (*parity, *cases) if case.calibrated and not unavailable(case)]
    with working() as watch:
        session = begin(where, seed, budget, watch)
        report = TimingReport(machine(session))
        try:
            with pool(workers) as executor:
                wanted = [*((case, way) for case in parity if not case.calibrated for way in ways(where)), *launches]
                report.uncompiled += compile_ahead(wanted, session, executor)
            time_kernels(cases, check_formats(parity, session, report), session, report)
        finally:  # an interrupted run keeps what it has found
            if output_dir is not None:
                write(report, output_dir)
    if json:
        typer.echo(jsonlib.dumps(report.to_dict(), indent=2))
    else:
        show_timings(report, Console())
    show_rest(report, Console(stderr=json), Console(stderr=True))
    if not report.ok:
        raise typer.Exit(1)


def tune(
    only: Only = "",
    budget: Seconds = None,
    workers: Workers = None,
    device: Device = "cuda",
    seed: Seed = None,
    output: Annotated[
        Path | None,
        typer.Option(help="File to write; default: fade/decode-<gpu>.json in $XDG_CONFIG_HOME or ~/.config."),
    ] = None,
    json: Json = False,
) -> None:
    """Search launch configurations of the decode kernel on this GPU and keep the fastest in a file that FADE reads.

    A configuration is kept only if the same run shows that what it computes is right. Rows that the file has for other
    cases stay. Exit code 1: parity was red, something failed or nothing was found.
    """
    from fade_kernels_triton.bench.cases import checked, selected
    from fade_kernels_triton.bench.compiling import compile_ahead
    from fade_kernels_triton.bench.report import TuningReport
    from fade_kernels_triton.bench.session import check_formats, ways
    from fade_kernels_triton.bench.tables import show_rest, show_searches
    from fade_kernels_triton.bench.tuned import TunedFile
    from fade_kernels_triton.bench.tuning import tried_for
    from fade_kernels_triton.bench.tuning import tune as search_all
    from fade_kernels_triton.device import gpu_name, overlaps

    where = usable(device)
    cases, parity = ([case for case in chosen if not case.calibrated] for chosen in (selected(only), checked(only)))
    overlap = overlaps(where)
    launches = [(case, config) for case in cases for config in tried_for(case, where, overlap)]
    tuned = TunedFile(output, gpu_name(where))
    with working() as watch:
        session = begin(where, seed, budget, watch)
        report = TuningReport(machine(session))
        with pool(workers) as executor:
            wanted = [*((case, way) for case in parity for way in ways(where)), *launches]
            report.uncompiled += compile_ahead(wanted, session, executor)
        search_all(cases, check_formats(parity, session, report), overlap, session, report, tuned.keep)
    if json:
        typer.echo(jsonlib.dumps(report.to_dict(), indent=2))
    else:
        show_searches(report, Console())
    show_rest(report, Console(stderr=json), Console(stderr=True))
    if report.searches:
        Console(stderr=True).print(tuned.advice(), markup=False, highlight=False, soft_wrap=True)
    if not report.ok:
        raise typer.Exit(1)


def usable(device: str) -> torch.device:
    """The CUDA device of that name, as the current one. Raises ``ConfigError`` where nothing can be timed, and why."""
    import torch

    from fade_core.errors import ConfigError
    from fade_kernels_triton.device import unusable

    try:
        where = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}") from error
    if where.type == "cuda" and (where.index or 0) >= (count := torch.cuda.device_count()) > 0:
        raise ConfigError(f"--device {device}: torch sees {count} CUDA devices here, the first of which is cuda:0")
    reason = unusable(where)
    if not reason and where.type != "cuda":
        reason = "Triton interprets kernels here (TRITON_INTERPRET=1), and the time of that says nothing"
    if reason:
        raise ConfigError(
            f"the kernels cannot be timed on {device}: {reason}. Run this on a machine with an NVIDIA GPU; whether the "
            f"kernels are right can be checked without one: TRITON_INTERPRET=1 fade check-kernels"
        )
    if where.index is not None:
        torch.cuda.set_device(where)
    return torch.device("cuda", torch.cuda.current_device())


def begin(where: torch.device, seed: int | None, budget: float | None, watch: Watch) -> Session:
    """A session whose budget runs from now."""
    from fade_kernels_triton.bench.session import Session
    from fade_kernels_triton.bench.timing import Budget

    return Session(where, secrets.randbelow(2**31) if seed is None else seed, watch, Budget(budget))


def machine(session: Session) -> Machine:
    """What the session runs on, with the bandwidth of a copy."""
    import torch
    import triton

    from fade_kernels_triton.bench.report import Machine
    from fade_kernels_triton.bench.timing import copy_bandwidth, copy_size
    from fade_kernels_triton.device import gpu_name

    session.watch("copying", 0, 1)
    copied = copy_bandwidth(session.device, session.timer, copy_size(session.device))
    torch.cuda.empty_cache()
    return Machine(gpu_name(session.device), torch.__version__, triton.__version__, copied, session.seed)


def pool(workers: int | None) -> ProcessPoolExecutor:
    """Processes that compile; fresh ones, since CUDA does not survive a fork."""
    from fade_kernels_triton.bench.compiling import workers as default

    return ProcessPoolExecutor(workers or default(), mp_context=multiprocessing.get_context("spawn"))


def write(report: TimingReport, folder: Path) -> None:
    """``kernels.json`` and, where something was timed, ``kernels.png``. Raises ``InputError`` if it cannot be written."""
    from fade_core.errors import InputError
    from fade_kernels_triton.bench.plot import draw

    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "kernels.json").write_text(jsonlib.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
        if any(timing.ratio is not None for timing in report.timings):
            draw(report, folder / "kernels.png")
    except OSError as error:
        raise InputError(f"--output-dir {folder} cannot be written: {error}") from error


@contextmanager
def working() -> Iterator[Watch]:
    """A progress bar on stderr for the length of the block, which says what is being done."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)

        def watch(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield watch
