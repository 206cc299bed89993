"""What the commands show in a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from fade_kernels_triton.bench.report import Report, TimingReport, TuningReport, short
from fade_kernels_triton.bench.timing import terabytes
from fade_kernels_triton.parity import ALLOWED


def show_timings(found: TimingReport, out: Console) -> None:
    """A row a timed case: microseconds of the kernel and of each baseline, ratio, TB/s, and the kernel through a table."""
    names = list(dict.fromkeys(name for one in found.baselines for name in (*one.us, *one.troubles)))
    columns = ["kernel µs", *(f"{name} µs" for name in names), "times faster", "TB/s", "bf16 TB/s"]
    columns += ["table µs", "table / flat"]
    table = _table(str(found.machine), "case", columns, "launch")
    for timing in found.timings:
        base = timing.baseline
        bf16 = terabytes(base.nbytes, base.us[base.best]) if base.best else None
        table.add_row(
            timing.case,
            f"{timing.us:.1f}",
            *(f"{base.us[name]:.1f}" if name in base.us else "did not run" for name in names),
            f"{timing.ratio:.2f}" if timing.ratio is not None else "-",
            f"{timing.tb_s:.2f}",
            f"{bf16:.2f}" if bf16 is not None else "-",
            f"{timing.table_us:.1f}" if timing.table_us is not None else "-",
            f"{timing.table_ratio:.3f}" if timing.table_ratio is not None else "-",
            short(timing.config),
        )
    out.print(table)
    for one in found.baselines:
        for name, trouble in one.troubles.items():
            _say(out, f"{name} did not run {one.shape}: {trouble}")


def show_searches(found: TuningReport, out: Console) -> None:
    """A row a tuned case: the launch in use and the one found."""
    table = _table(str(found.machine), "case", ["in use µs", "found µs", "times faster"], "in use", "found")
    for search in found.searches:
        (before, before_us), (best, best_us) = search.before, search.best
        table.add_row(
            search.case,
            f"{before_us:.1f}" if before_us is not None else "did not run",
            f"{best_us:.1f}",
            f"{before_us / best_us:.2f}" if before_us is not None else "-",
            short(before),
            short(best),
        )
    out.print(table)


def show_rest(found: Report, out: Console, errors: Console) -> None:
    """Parity in a line, or the red cases; what was skipped and what failed."""
    ratios = [check.agreement.error / check.agreement.reference for check in found.checks if check.agreement]
    red = [check for check in found.checks if not check.green]
    if ratios and not red:
        _say(
            out,
            f"parity: {len(ratios)} checks green; at most {max(ratios):.2f} of bf16's own error ({ALLOWED:g} is allowed)",
        )
    for check in red:
        said = check.trouble
        if check.agreement:
            said = f"error {check.agreement.error:.2e}, bf16's own {check.agreement.reference:.2e}"
        _say(errors, f"parity is red: {check.case} {short(check.config)}: {said}")
    for note in found.skipped:
        _say(errors, f"skipped: {note.what}: {note.why}")
    for note in found.failures:
        _say(errors, f"failed: {note.what}: {note.why}")
    if found.uncompiled:
        _say(errors, f"{len(found.uncompiled)} launches did not compile ahead, such as {found.uncompiled[0].what}")


def _table(title: str, first: str, numbers: list[str], *last: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right")
    for name in last:
        table.add_column(name)
    return table


def _say(console: Console, line: str) -> None:
    """A line as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)
