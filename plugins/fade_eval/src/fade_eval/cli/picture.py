"""A picture of which tokens live in which tier: layers and heads down, positions across."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_COLOURS = ("#14213d", "#2a6f97", "#89c2d9", "#cfe8ef", "#b08968", "#ddb892")
EVICTED = "#f2f2f2"


@dataclass(frozen=True)
class TierPicture:
    """Where the tokens of one cache live.

    Attributes:
        names: tier names; index 0 is full precision.
        layers: layer indices shown.
        tiers: int64 ``[layers * H_kv, T]``: tier of each token of the first row, -1 where it is evicted.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    tiers: Tensor

    @classmethod
    def of(cls, cache: Any) -> TierPicture:
        """What a tiered cache holds now."""
        cache.settle()
        tiers = torch.cat([layer.held.tier_map()[0].cpu() for layer in cache.tiered])
        return cls(tuple(cache.tier_names()), tuple(layer.index for layer in cache.tiered), tiers)

    def shares(self) -> dict[str, float]:
        """Share of tokens in each tier, "evicted" included."""
        named = {name: float((self.tiers == level).float().mean()) for level, name in enumerate(self.names)}
        return named | {"evicted": float((self.tiers < 0).float().mean())}


def draw(pictures: Mapping[str, TierPicture], path: Path) -> None:
    """Write one panel a cache to an image file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    colours = colours_of([picture.names for picture in pictures.values()])
    figure = Figure(figsize=(14, 1.2 + 2.6 * len(pictures)), layout="constrained")
    panels = figure.subplots(len(pictures), 1, squeeze=False)[:, 0]
    for panel, (name, picture) in zip(panels, pictures.items(), strict=True):
        palette = torch.tensor([to_rgb(EVICTED), *(to_rgb(colours[tier]) for tier in picture.names)])
        height = picture.tiers.shape[0]
        panel.imshow(palette[picture.tiers + 1].numpy(), aspect="auto", extent=(0, picture.tiers.shape[1], height, 0))
        shares = ", ".join(f"{tier} {share:.1%}" for tier, share in picture.shares().items() if share)
        panel.set_title(f"{name}: {shares}", loc="left", fontsize=10)
        heads = height // len(picture.layers)
        ticks = range(0, len(picture.layers), max(1, len(picture.layers) // 6))
        panel.set_yticks([(tick + 0.5) * heads for tick in ticks], [str(picture.layers[tick]) for tick in ticks])
        panel.set_ylabel("layer (heads within)")
    panels[-1].set_xlabel("position")
    handles = [Patch(facecolor=colour, label=name) for name, colour in colours.items()]
    handles.append(Patch(facecolor=EVICTED, edgecolor="#999999", label="evicted"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False)
    FigureCanvasAgg(figure).print_png(str(path))


def colours_of(names: Sequence[Sequence[str]]) -> dict[str, str]:
    """A colour for every tier name, darkest for full precision, the same in all panels."""
    known: dict[str, str] = {}
    for name in (name for tiers in names for name in tiers):
        known.setdefault(name, _COLOURS[len(known) % len(_COLOURS)])
    return known
