"""The plot of ``fade bench kernels``: how many times faster, and TB/s beside that of copying."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fade_kernels_triton.bench.timing import terabytes

if TYPE_CHECKING:
    from fade_kernels_triton.bench.report import TimingReport

_KERNEL, _BF16, _LINE = "#89c2d9", "#b5651d", "#14213d"


def draw(found: TimingReport, path: Path) -> None:
    """Write a row a timed case, those without a baseline left out, to an image file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timings = [timing for timing in found.timings if timing.ratio is not None]
    figure = Figure(figsize=(11, 2 + 0.32 * len(timings)), layout="constrained")
    faster, speed = figure.subplots(1, 2, sharey=True)
    places = range(len(timings))
    ratios = [timing.ratio or 0.0 for timing in timings]
    faster.barh(places, ratios, color=_KERNEL)
    for place, timing in zip(places, timings, strict=True):
        faster.text(
            timing.ratio or 0.0, place, f" {timing.ratio:.2f} ({timing.baseline.best})", va="center", fontsize=7
        )
    faster.axvline(1, color=_LINE, lw=1)
    faster.set_xlim(0, 1.3 * max([1.0, *ratios]))
    faster.set_xlabel("times faster than the fastest bf16 attention")
    faster.set_yticks(list(places), [timing.case for timing in timings], fontsize=7)
    faster.invert_yaxis()
    rivals = [terabytes(t.baseline.nbytes, t.baseline.us[t.baseline.best]) for t in timings if t.baseline.best]
    speed.barh(
        [place - 0.2 for place in places], [timing.tb_s for timing in timings], 0.4, color=_KERNEL, label="kernel"
    )
    speed.barh([place + 0.2 for place in places], rivals, 0.4, color=_BF16, label="fastest bf16 attention")
    speed.axvline(found.machine.copy_tb_s, color=_LINE, lw=1, ls="--", label="copying, read plus write")
    speed.set_xlabel("TB/s of the operands")
    speed.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    figure.suptitle(str(found.machine), fontsize=8)
    FigureCanvasAgg(figure).print_figure(path, dpi=150)
