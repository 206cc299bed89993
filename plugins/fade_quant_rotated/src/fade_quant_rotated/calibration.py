"""What calibration found out about a model: the file, and the bits it leads to."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fade_core.errors import CheckpointError, ConfigError
from fade_core.interfaces import Side
from fade_core.packed import WORD_BITS
from fade_quant_rotated.allocation import check_widths, saved_by_planes, water_fill
from fade_quant_rotated.lloyd_max import Levels
from fade_quant_rotated.planes import PLANE_BITS, PLANE_CHANNELS, in_planes, plane_words, row_of

FORMAT = 1
"""Written into files; raised when the meaning of a tensor changes."""

DATA = Path(__file__).parent / "data"

_KIND = "fade-kv-calibration"
GAIN_BITS = 4


@dataclass(frozen=True)
class SideCalibration:
    """Keys or values of one layer, ``H`` KV heads of ``D`` channels.

    Attributes:
        mean: float32 ``[H, D]``.
        transform: float16 ``[H, D, D]``, columns of unit length; the channels of ``y = (x - mean) @ transform`` are
            uncorrelated.
        deviation: float32 ``[H, D]``, standard deviation of ``y`` under the attention weights, falling in worth.
        spread: float32 ``[H, D]``, mean square of ``y / deviation`` over all tokens, unweighted.
        worth: float32 ``[H, D]``, what dropping a channel costs, on one scale for all layers and both sides.
    """

    mean: Tensor
    transform: Tensor
    deviation: Tensor
    spread: Tensor
    worth: Tensor

    def inverse(self) -> Tensor:
        """Float32 ``[H, D, D]`` with ``y @ inverse = x - mean``, exact for the rounded ``transform``."""
        result: Tensor = torch.linalg.inv(self.transform.double()).float()
        return result


@dataclass(frozen=True)
class Plan:
    """Bits of every channel of every layer.

    Attributes:
        widths: layer to int64 ``[H, D]``, by side.
        bits: what was asked for.
    """

    widths: Mapping[Side, Mapping[int, Tensor]]
    bits: float

    def average(self, side: Side) -> float:
        """Average width of a channel of one side, metadata not counted."""
        return float(torch.stack(list(self.widths[side].values())).double().mean())


@dataclass(frozen=True, eq=False)
class Calibration:
    """Transforms of a model, and how to spend bits on them.

    Attributes:
        sides: layer to ``SideCalibration``, by side.
        head_dim: channels ``D``.
        num_kv_heads: KV heads ``H_kv``.
        num_layers: layers of the model, those without full attention included.
        sketch: float32 ``[layers, n]``, random projections of the model's output projections: tells models apart.
        defaults: "bits", "widths", "group" to use where a configuration names none.
        notes: where it came from: model, tokens, sinks, window, seconds.
    """

    sides: Mapping[Side, Mapping[int, SideCalibration]]
    head_dim: int
    num_kv_heads: int
    num_layers: int
    sketch: Tensor
    defaults: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)

    # --- bits ---
    def plan(
        self,
        bits: float,
        widths: Sequence[int],
        group: int = 1,
        side: Side | None = None,
        levels: Levels = "gaussian",
        tile: int = 64,
    ) -> Plan:
        """Spend ``bits`` an element, gains and padding counted, where they save most.

        Where codes are planes (``in_planes``), each layer and side has whole ones.

        Args:
            bits: average over keys and values of all layers, or over one side if ``side`` is given.
            widths: widths to choose from.
            group: neighbouring channels that share a width.
            side: spend them on this side alone; the other gets none.
            levels: which levels codes stand for.
            tile: tokens a tile.

        Raises:
            ConfigError: if the widths cannot give that average.
        """
        widths = check_widths(widths)
        sides: tuple[Side, ...] = ("key", "value") if side is None else (side,)
        heads, dim = self.num_kv_heads, self.head_dim
        left = bits - GAIN_BITS / dim
        planes = in_planes(widths, levels)
        if not planes and left > 0:
            left = max(0.0, left - WORD_BITS * (heads - 1) / (tile * heads * dim))  # words of padding, at most
        if not 0 <= left <= widths[-1]:
            raise ConfigError(
                f"bits={bits:g} an element cannot be had: gains take {GAIN_BITS / dim:.3f}, and the codes "
                f"have widths {list(widths)}"
            )
        layers = sorted(self.sides["key"])
        worth = torch.stack([torch.stack([self.sides[s][layer].worth for layer in layers]) for s in sides])
        if planes:
            found = self._in_planes(worth.flatten(0, 1), left, widths, group, tile).view(worth.shape)
        else:
            found = water_fill(worth, left, widths, group)
        return Plan({s: dict(zip(layers, found[i], strict=True)) for i, s in enumerate(sides)}, bits)

    def _in_planes(self, worth: Tensor, bits: float, widths: tuple[int, ...], group: int, tile: int) -> Tensor:
        """Widths int64 ``[N, H, D]`` for ``worth`` ``[N, H, D]`` of ``N`` layers and sides: whole planes, the best first.

        Each has one before any has two: kernels read no layer whose keys or values have none.
        """
        heads, dim = self.num_kv_heads, self.head_dim
        saved = [saved_by_planes(own, PLANE_CHANNELS * PLANE_BITS, widths, group) for own in worth]
        owner = torch.cat([torch.full((len(own),), number) for number, own in enumerate(saved)])
        for own in saved:
            own[0] = torch.inf
        owner = owner[torch.cat(saved).argsort(descending=True, stable=True)]
        room = int(bits * tile * dim * len(worth) / WORD_BITS + 1e-9)  # words of a head
        most = min(len(owner), room * heads // plane_words(tile))
        while True:
            counts = owner[:most].bincount(minlength=len(worth)).tolist()
            if sum(row_of(count, heads, tile) for count in counts) <= room:
                break
            most -= 1
        own_bits = [count * PLANE_CHANNELS * PLANE_BITS / (heads * dim) for count in counts]
        filled = [
            water_fill(own, min(part, widths[-1]), widths, group) for own, part in zip(worth, own_bits, strict=True)
        ]
        return torch.stack(filled)

    # --- files ---
    def save(self, path: str | Path) -> None:
        """Write to ``path`` (safetensors)."""
        tensors = {"sketch": self.sketch.contiguous()}
        for side, layers in self.sides.items():
            for layer, found in layers.items():
                tensors |= {f"{layer}.{side}.{n}": t.contiguous().cpu() for n, t in vars(found).items()}
        header = {
            "kind": _KIND,
            "format": FORMAT,
            "head_dim": self.head_dim,
            "num_kv_heads": self.num_kv_heads,
            "num_layers": self.num_layers,
            "layers": sorted(self.sides["key"]),
            "defaults": dict(self.defaults),
            "notes": dict(self.notes),
        }
        save_file(tensors, str(path), metadata={"fade": json.dumps(header, sort_keys=True)})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what ``save`` wrote. Raises ``CheckpointError`` for anything else."""
        if not Path(path).is_file():
            raise CheckpointError(
                f"there is no calibration file {str(path)!r}; 'fade calibrate --model MODEL --text FILE -o {path}' "
                "makes one"
            )
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        except SafetensorError as error:
            raise CheckpointError(f"{str(path)!r} is not a safetensors file: {error}") from error
        try:
            header = json.loads(metadata.get("fade", "{}"))
            if header.get("kind") != _KIND:
                raise CheckpointError(f"{str(path)!r} is a safetensors file, but not one that 'fade calibrate' wrote")
            if header["format"] != FORMAT:
                raise CheckpointError(
                    f"{str(path)!r} has format {header['format']}, this version reads {FORMAT}; run 'fade "
                    "calibrate' again"
                )
            names = SideCalibration.__dataclass_fields__
            sides: dict[Side, dict[int, SideCalibration]] = {
                side: {
                    layer: SideCalibration(**{n: tensors[f"{layer}.{side}.{n}"] for n in names})
                    for layer in header["layers"]
                }
                for side in ("key", "value")
            }
            dims = header["head_dim"], header["num_kv_heads"], header["num_layers"]
            return cls(sides, *dims, tensors["sketch"], header["defaults"], header["notes"])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{str(path)!r} is damaged: {error}; run 'fade calibrate' again") from error

    def check_model(self, sketch: Tensor) -> None:
        """Refuse a model whose output projections are not those of the model calibrated.

        A fine-tune that moved them little is the same model here: its keys and values are alike, too.

        Args:
            sketch: what ``sketch_of`` found in the model.

        Raises:
            CheckpointError: if they are not.
        """
        alike = 0.0
        if sketch.shape == self.sketch.shape:
            alike = float(torch.nn.functional.cosine_similarity(sketch.flatten(), self.sketch.flatten(), dim=0))
        if alike < 0.98:
            raise CheckpointError(
                f"the calibration was made for another model ({self.notes.get('model', 'unknown')}; likeness "
                f"{alike:.2f}); run 'fade calibrate' on this one"
            )


@lru_cache(maxsize=8)
def _loaded(path: str, stamp: tuple[int, int]) -> Calibration:
    return Calibration.load(path)


SHIPPED = ("smollm2",)
"""Calibrations that come with this distribution, by name: SmolLM2-135M-Instruct, from the calibration texts of the core."""


def load_calibration(path: str | Path) -> Calibration:
    """``Calibration.load``, remembered as long as the file does not change; also takes a name in ``SHIPPED``."""
    found = DATA / f"{path}.safetensors" if path in SHIPPED else Path(path)
    if not found.is_file():
        return Calibration.load(path)
    status = found.stat()
    return _loaded(str(found.resolve()), (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=16)
def plan_of(
    calibration: Calibration,
    bits: float,
    widths: tuple[int, ...],
    group: int,
    side: Side | None = None,
    levels: Levels = "gaussian",
    tile: int = 64,
) -> Plan:
    """``calibration.plan``, computed once for all layers."""
    return calibration.plan(bits, widths, group, side, levels, tile)
