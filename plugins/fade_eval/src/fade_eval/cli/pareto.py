"""The Pareto plot of ``fade eval quality``: divergence over bits an element, and over the bytes that were held."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fade_eval.quality import QualityRow

_MARKS = {"recipe": ("o", "#2a6f97"), "configuration": ("D", "#b5651d"), "peer": ("s", "#8d99ae")}
SMALLEST = 1e-7
"""Divergences below this, in nats, are drawn here: zero has no place on a logarithmic axis."""


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points that no other beats in both coordinates (less is better), by the first; NaN never wins."""
    best, kept = math.inf, []
    for index in sorted((i for i, p in enumerate(points) if not any(map(math.isnan, p))), key=lambda i: points[i]):
        if points[index][1] < best:
            best = points[index][1]
            kept.append(index)
    return kept


def draw(rows: Sequence[QualityRow], title: str, path: Path) -> None:
    """Write both panels to an image file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(15, 7), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _panel(left, rows, [row.bits for row in rows])
    _panel(right, rows, [row.bytes_per_token for row in rows])
    left.set_xlabel("bits a packed element, metadata counted")
    right.set_xlabel("bytes a token, all live tensors at the end")
    left.set_ylabel("mean KL to the exact cache (nats), with standard error")
    used = {row.source for row in rows}
    handles = [Line2D([], [], ls="", marker=m, color=c, label=s) for s, (m, c) in _MARKS.items() if s in used]
    handles.append(Line2D([], [], color="#14213d", lw=1, label="none better and smaller"))
    left.legend(handles=handles, frameon=False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    FigureCanvasAgg(figure).print_png(str(path))


def _panel(panel: Any, rows: Sequence[QualityRow], across: Sequence[float]) -> None:
    heights = [max(row.kl_mean, SMALLEST) for row in rows]
    points = list(zip(across, heights, strict=True))
    best = front(points)
    known = [x for x in across if not math.isnan(x)]
    middle = (min(known) + max(known)) / 2 if known else 0.0
    panel.step(
        [points[i][0] for i in best], [points[i][1] for i in best], where="post", color="#14213d", lw=1, zorder=1
    )
    for place, (row, (x, y)) in enumerate(zip(rows, points, strict=True)):
        if math.isnan(x):
            continue
        marker, colour = _MARKS[row.source]
        below = min(row.kl_standard_error or 0.0, y * 0.9)
        error = [[below], [row.kl_standard_error or 0.0]]
        panel.errorbar([x], [y], yerr=error, fmt=marker, color=colour, capsize=2, zorder=2)
        side, shift = ("left", 5) if x <= middle else ("right", -5)
        weight = "bold" if place in best else "normal"
        panel.annotate(
            row.name, (x, y), xytext=(shift, 4), textcoords="offset points", fontsize=7, weight=weight, ha=side
        )
    panel.set_yscale("log")
    panel.grid(alpha=0.25)
