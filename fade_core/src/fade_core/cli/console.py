"""What the commands print with: tables, progress bars, JSON, sizes for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

out = Console()
"""Results: stdout."""
errors = Console(stderr=True)
"""Messages and progress: stderr, so that results can be piped."""

Advance = Callable[[int, int], None]
"""Called with the units done and the units in all."""


@contextmanager
def working(what: str) -> Iterator[Advance]:
    """A progress bar on stderr for the length of the block; it moves when the yielded function is called.

    Args:
        what: a few words, such as "loading smollm2".
    """
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as progress:
        task = progress.add_task(what, total=None)

        def advance(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


def table(title: str, *columns: str) -> Table:
    """An empty table; columns whose name starts with ">" hold numbers: they are aligned to the right."""
    made = Table(title=title or None, title_justify="left")
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return made


def show_figures(made: Table) -> None:
    """Print a table of many numbers as wide as these are, where the terminal is narrower: folded, nobody can read them."""
    for column in made.columns:
        column.no_wrap = True
    needed = made.__rich_measure__(out, out.options.update(max_width=1000)).maximum
    Console(file=out.file, width=max(out.width, needed)).print(made)


def rows(made: Table, lines: Sequence[Sequence[object]]) -> Table:
    """``made`` with ``lines`` added as text."""
    for line in lines:
        made.add_row(*(str(cell) for cell in line))
    return made


def say(line: str) -> None:
    """A line on stdout as it is: paths stay whole, however narrow the terminal."""
    out.print(line, markup=False, highlight=False, soft_wrap=True)


def complain(line: str) -> None:
    """``say`` on stderr."""
    errors.print(line, markup=False, highlight=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """``value`` as indented JSON on stdout; NaN becomes null."""
    print(json.dumps(_finite(value), indent=2))  # noqa: T201 (rich would wrap long lines)


def size(nbytes: float) -> str:
    """Bytes for people: ``12.8 MB`` (powers of 1000)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes:.0f} B"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value != value:  # noqa: PLR0124 (NaN)
        return None
    return value
