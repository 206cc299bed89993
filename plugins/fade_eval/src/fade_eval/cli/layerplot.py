"""The plot of ``fade eval sensitivity``: a bar a layer."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fade_eval.sensitivity import SensitivityResult

_BAR, _WORST = "#89c2d9", "#b5651d"


def draw(found: SensitivityResult, worst: Collection[int], title: str, path: Path) -> None:
    """Write the divergence of each layer, in the model's order, to an image file; ``worst`` stand out."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 2 + 0.3 * len(found.layers)), 4.5), layout="constrained")
    panel = figure.subplots()
    places = range(len(found.layers))
    heights = [layer.kl_mean for layer in found.layers]
    errors = [layer.kl_standard_error or 0.0 for layer in found.layers]
    colours = [_WORST if layer.layer in worst else _BAR for layer in found.layers]
    panel.bar(places, heights, yerr=errors, color=colours, ecolor="#14213d", capsize=2)
    panel.axhline(found.sum / len(found.layers), color="#8d99ae", lw=1, ls="--", label="mean of the layers")
    panel.set_xticks(list(places), [str(layer.layer) for layer in found.layers], fontsize=8)
    panel.set_ylim(bottom=0)
    panel.set_xlabel("layer")
    panel.set_ylabel("mean KL to the exact cache (nats)")
    panel.set_title(title, loc="left", fontsize=10)
    panel.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))
