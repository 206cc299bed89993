"""What calibration found out about a model: the file, and the bits it leads to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from fade_core import FileHeader, FileKind
from fade_core.errors import CheckpointError, ConfigError
from fade_core.interfaces import Side
from fade_core.packed import WORD_BITS
from fade_quant_rotated.allocation import check_widths, saved_by_planes, water_fill
from fade_quant_rotated.lloyd_max import Levels
from fade_quant_rotated.planes import PLANE_BITS, PLANE_CHANNELS, in_planes, plane_words, row_of

DATA = Path(__file__).parent / "data"

MOST = 65_536
"""Layers, heads or channels that no model has."""

GAIN_BITS = 4


class CalibrationDefaults(FileHeader):
    """What a calibration is used with where a configuration says nothing: ``Calibration.plan`` explains them."""

    bits: Annotated[float, Field(strict=True, gt=0, le=16)]
    widths: Annotated[tuple[Annotated[int, Field(strict=True, ge=0, le=16)], ...], Field(min_length=1, max_length=17)]
    group: Annotated[int, Field(strict=True, ge=1, le=MOST)]


class CalibrationHeader(FileHeader):
    """What a calibration file says of itself; see ``Calibration``.

    Attributes:
        layers: layers that have been calibrated, ascending.
    """

    head_dim: Annotated[int, Field(strict=True, ge=1, le=MOST)]
    num_kv_heads: Annotated[int, Field(strict=True, ge=1, le=MOST)]
    num_layers: Annotated[int, Field(strict=True, ge=1, le=MOST)]
    layers: Annotated[
        tuple[Annotated[int, Field(strict=True, ge=0, lt=MOST)], ...], Field(min_length=1, max_length=MOST)
    ]
    defaults: CalibrationDefaults
    notes: dict[str, JsonValue]


CALIBRATION_FILE = FileKind(
    "fade-kv-calibration",
    1,
    "a calibration",
    "'fade calibrate --model MODEL --text FILE -o FILE' makes one",
    CalibrationHeader,
)
"""Its format is raised when the meaning of a tensor changes."""


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
        """Write to ``path`` (safetensors with a checksum). Raises ``CheckpointError`` if it cannot be written."""
        tensors = {"sketch": self.sketch.cpu()}
        for side, layers in self.sides.items():
            for layer, found in layers.items():
                tensors |= {f"{layer}.{side}.{n}": t.cpu() for n, t in vars(found).items()}
        header = {
            "head_dim": self.head_dim,
            "num_kv_heads": self.num_kv_heads,
            "num_layers": self.num_layers,
            "layers": sorted(self.sides["key"]),
            "defaults": dict(self.defaults),
            "notes": dict(self.notes),
        }
        CALIBRATION_FILE.write(path, header, tensors)

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read what ``save`` wrote. Raises ``CheckpointError`` for anything else, and for damage anywhere."""
        header, tensors = CALIBRATION_FILE.read(path)
        heads, dim = header.num_kv_heads, header.head_dim
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys(SideCalibration.__dataclass_fields__, (heads, dim))
        shapes["transform"] = (heads, dim, dim)
        wanted = {
            f"{layer}.{side}.{name}": (shape, torch.float16 if name == "transform" else torch.float32)
            for layer in header.layers
            for side in ("key", "value")
            for name, shape in shapes.items()
        }
        sketch = tensors.get("sketch", torch.empty(0))
        wanted["sketch"] = ((*sketch.shape[:1], sketch.shape[-1]), torch.float32)
        for name in sorted(wanted.keys() | tensors.keys()):
            found = tensors.get(name)
            kind = None if found is None else (tuple(found.shape), found.dtype)
            if kind != wanted.get(name) or (found is not None and not bool(found.isfinite().all())):
                raise CheckpointError(
                    f"{str(path)!r} is damaged: tensor {name!r} is {kind or 'missing'}, {wanted.get(name, 'none')} of finite "
                    "numbers was expected; 'fade calibrate' makes another"
                )
        if list(header.layers) != sorted(set(header.layers)) or header.layers[-1] >= header.num_layers:
            raise CheckpointError(f"{str(path)!r} is damaged: layers {list(header.layers)} of {header.num_layers}")
        sides: dict[Side, dict[int, SideCalibration]] = {
            side: {
                layer: SideCalibration(**{name: tensors[f"{layer}.{side}.{name}"].clone() for name in shapes})
                for layer in header.layers
            }
            for side in ("key", "value")
        }
        defaults = header.defaults.model_dump(mode="json")
        return cls(sides, dim, heads, header.num_layers, sketch.clone(), defaults, header.notes)

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
