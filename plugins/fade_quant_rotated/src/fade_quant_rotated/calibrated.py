"""``kind = "calibrated"``: a transform learnt from the model's own attention, then bits where they matter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fade_core.errors import CheckpointError, ConfigError, InputError
from fade_core.interfaces import PlaneLayout, Quantizer, QuantizerConfig, QuantizerContext, RunLayout, Side
from fade_core.packed import Layout, Packed
from fade_quant_rotated.calibrate import sketch_of
from fade_quant_rotated.calibration import GAIN_BITS, Calibration, SideCalibration, load_calibration, plan_of
from fade_quant_rotated.levels import check_tokens, to_tiles
from fade_quant_rotated.lloyd_max import Levels
from fade_quant_rotated.planes import PlaneStream, fits_planes
from fade_quant_rotated.streams import StreamLayout, sent

GAIN_STEPS = 3
"""Gain codes an octave."""
GAIN_ZERO = 10
"""Gain code of a token as large as tokens usually are."""
GAIN_SEARCH = (-1, 0, 1, 2)
"""Gain codes that are tried, counted from that of the token's own root mean square."""
MOST_BITS = 8
"""Of a channel."""
CHUNK = 32
"""Tiles decoded at once by ``scores`` and ``combine``."""


class CalibratedQuantizer(Quantizer):
    """``x = mean + gain * levels[codes] @ inverse``: a KLT in the metric of the queries (keys) or of ``W_o`` (values).

    Channels that matter little get no bits and are not stored at all. Each token and head has a gain of 4 bits, chosen
    among a few for the least weighted error. The query meets the transform once, the output once; the mean of the keys
    adds a constant to each query's scores, which ``scores`` includes. The heads of a layer share its bits unevenly, so
    their tiles are stored together (``heads_together``).

    Args:
        calibration: transform of this layer and side.
        widths: int64 ``[H_kv, D]``, bits of each channel.
        side: "key" or "value".
        tile: tokens a tile.
        device: where tokens will be.
        levels: which levels codes stand for; "uniform" ones take a kernel less work.
    """

    kind: ClassVar[str] = "calibrated"
    moves_tokens = True
    heads_together: ClassVar[bool] = True

    def __init__(
        self,
        calibration: SideCalibration,
        widths: Tensor,
        side: Side = "key",
        tile: int = 64,
        device: torch.device | None = None,
        levels: Levels = "gaussian",
    ) -> None:
        self.tile, self.side, self.device, self.row, self.levels = tile, side, device, 0, levels
        self._adopt(calibration, widths)

    def _adopt(self, calibration: SideCalibration, widths: Tensor, inverse: Tensor | None = None) -> None:
        """Code with this transform and these widths from now on; ``inverse``: of the transform, where it is known."""
        self._planes: PlaneLayout | None = None
        self._runs: RunLayout | None = None
        self._lay_out(widths)
        device, kept = self.device, self.layout.kept
        stored = sent(widths > 0, calibration.spread.device)
        inverse = calibration.inverse() if inverse is None else inverse
        usual = (calibration.spread * stored).sum(-1) / stored.sum(-1).clamp_min(1)
        state = {
            "mean": calibration.mean.to(device),
            "forward": calibration.transform[:, :, :kept].half().to(device),
            "inverse": inverse[:, :kept].half().to(device),
            "deviation": calibration.deviation[:, :kept].to(device),
            "worth": (calibration.worth * stored)[:, :kept].to(device),  # 0: not stored, no error to weigh
            "usual": usual.clamp_min(1e-6).sqrt().log2().to(device),
        }
        self._state = {name: tensor.contiguous() for name, tensor in state.items()}  # as a checkpoint brings them back

    def _lay_out(self, widths: Tensor) -> None:
        self.heads, self.head_dim = widths.shape
        self.widths = widths.to(torch.int8)
        word_order: Layout = "token" if self.side == "key" else "channel"
        stream = PlaneStream if fits_planes(widths.long(), self.levels, self.tile, self.row) else StreamLayout
        self.layout = stream(widths.long(), self.tile, word_order, self.device, self.row, self.levels)

    @property
    def bits_per_element(self) -> float:
        return self.layout.bits_per_element + GAIN_BITS / self.head_dim

    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"codes": ((self.layout.row,), torch.int16), "gain": ((self.tile // 2,), torch.uint8)}

    # --- codes ---
    def encode(self, x: Tensor) -> Packed:
        check_tokens(x, self.head_dim, f"quantizer {self.kind!r}")
        if x.shape[1] != self.heads:
            raise InputError(f"this quantizer is for {self.heads} KV heads; found a tensor of shape {tuple(x.shape)}")
        parts = [self._encode(part) for part in to_tiles(x.float(), self.tile).split(CHUNK, dim=2)]
        fields = {name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]}
        return Packed(fields, x.shape[2], x.dtype)

    def _encode(self, tiles: Tensor) -> dict[str, Tensor]:
        """Fields of ``[B, H, n, tile, D]``."""
        state = self._state
        deviation, worth = state["deviation"][:, None, None], state["worth"][:, None, None]
        y = (tiles - state["mean"][:, None, None]) @ state["forward"].float()[:, None] / deviation
        stored = (worth > 0).to(y)
        size = (y.square() * stored).sum(-1) / stored.sum(-1).clamp_min(1)
        own = (size.clamp_min(1e-30).sqrt().log2() - state["usual"][:, None, None]) * GAIN_STEPS + GAIN_ZERO
        own = own.round()
        best: Tensor | None = None
        for step in GAIN_SEARCH:
            code = (own + step).clamp(0, 2**GAIN_BITS - 1)
            gain = self._gain(code)[..., None]
            rounded = self.layout.values(self.layout.codes(y / gain), y.dtype) * gain
            error = ((rounded - y).square() * worth).sum(-1)
            if best is None:
                best, chosen = error, code
            else:
                better = error < best
                best, chosen = torch.where(better, error, best), torch.where(better, code, chosen)
        codes = self.layout.codes(y / self._gain(chosen)[..., None])
        return {"codes": self.layout.pack(codes), "gain": _to_nibbles(chosen)}

    def _gain(self, code: Tensor) -> Tensor:
        """Float32 gains of codes ``[B, H, n, tile]``."""
        return torch.exp2((code - GAIN_ZERO) / GAIN_STEPS + self._state["usual"][:, None, None])

    def _unpacked(self, packed: Packed, tiles: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Levels ``[B, H, t, kept]`` and gains ``[B, H, t]`` of some tiles."""
        levels = self.layout.values(self.layout.unpack(packed.fields["codes"][:, :, tiles]), dtype)
        gain = self._gain(_from_nibbles(packed.fields["gain"][:, :, tiles]).float())
        return levels.flatten(2, 3), gain.flatten(2).to(dtype)

    def decode(self, packed: Packed) -> Tensor:
        levels, gain = self._unpacked(packed, slice(None), torch.float32)
        y = (levels * gain[..., None])[:, :, : packed.length]
        return self.transform_output(y, torch.ones_like(y[..., :1])).to(packed.dtype)

    def select(self, packed: Packed, index: Tensor) -> Packed:
        if index.shape[-1] % self.tile:
            raise InputError(f"{index.shape[-1]} tokens selected; a multiple of the tile ({self.tile}) is needed")
        gain = _from_nibbles(packed.fields["gain"]).flatten(2).gather(2, index).unflatten(2, (-1, self.tile))
        fields = {"codes": self.layout.select(packed.fields["codes"], index), "gain": _to_nibbles(gain)}
        return Packed(fields, index.shape[-1], packed.dtype)

    # --- attention ---
    def scores(self, query: Tensor, packed: Packed) -> Tensor:
        inside = self.transform_query(query)
        parts = [self.query_bias(query).expand(*query.shape[:3], 0)]
        for start in range(0, packed.fields["codes"].shape[2], CHUNK):
            levels, gain = self._unpacked(packed, slice(start, start + CHUNK), query.dtype)
            parts.append(inside @ levels.transpose(-1, -2) * gain[:, :, None])
        return torch.cat(parts, dim=-1)[..., : packed.length] + self.query_bias(query)

    def combine(self, weights: Tensor, packed: Packed) -> Tensor:
        step = CHUNK * self.tile
        total = weights.new_zeros(*weights.shape[:3], self.layout.kept)
        for number, part in enumerate(weights.split(step, dim=-1)):
            levels, gain = self._unpacked(packed, slice(number * CHUNK, (number + 1) * CHUNK), weights.dtype)
            count = part.shape[-1]
            total += (part * gain[:, :, None, :count]) @ levels[:, :, :count]
        return self.transform_output(total, weights.sum(-1, keepdim=True))

    def planes(self) -> PlaneLayout | None:
        """Where a kernel finds the codes, of even widths and uniform levels; ``None`` for others."""
        if self._planes is None and isinstance(self.layout, PlaneStream) and self.levels == "uniform":
            state, (planes, slots, scales) = self._state, self.layout.table()
            length = state["inverse"].float().norm(dim=-1) * state["deviation"].abs()  # [H, kept]
            channels = slots[..., 0].long().flatten(1)  # [H, P * 16]
            longest = length.gather(1, channels) * scales.flatten(1)
            device, kept = length.device, self.layout.kept
            self._planes = PlaneLayout(
                self.tile,
                self.layout.row,
                self.layout.layout,
                planes,
                slots,
                scales,
                sent(self.widths[:, :kept].to(torch.int32).contiguous(), device),
                sent(self.layout.steps().contiguous(), device),
                state["usual"],
                GAIN_ZERO,
                GAIN_STEPS,
                (GAIN_SEARCH[0], GAIN_SEARCH[-1]),
                state["mean"],
                state["deviation"],
                state["worth"],
                state["forward"],
                state["inverse"],
                longest.amax(1),
            )
        return self._planes

    def runs(self) -> RunLayout | None:
        """Where a kernel that looks levels up finds the codes, of any widths."""
        if self._runs is None:
            device, kept = self._state["usual"].device, self.layout.kept
            levels = torch.zeros(2 * 2**MOST_BITS)
            for width, _, _ in self.layout.runs:
                levels[2**width : 2 ** (width + 1)] = torch.tensor(self.layout.levels(width))
            gains = self._gain(torch.arange(2**GAIN_BITS, device=device).view(1, 1, 1, -1).float())  # [1, H, 1, 16]
            self._runs = RunLayout(
                self.tile,
                self.layout.row,
                self.layout.layout,
                self.layout.blocks(),
                sent(self.widths[:, :kept].to(torch.int32).contiguous(), device),
                sent(levels, device),
                gains[0, :, 0].contiguous(),
            )
        return self._runs

    def transform_query(self, query: Tensor) -> Tensor:
        """The query ``[B, H_kv, N, D]`` in the space of the stored channels, ``[B, H_kv, N, kept]``."""
        inverse, deviation = (self._state[name].to(query.dtype) for name in ("inverse", "deviation"))
        return query @ inverse.transpose(-1, -2) * deviation[:, None]

    def query_bias(self, query: Tensor) -> Tensor:
        """The query's inner product with the mean key, ``[B, H_kv, N, 1]``."""
        return query @ self._state["mean"].to(query.dtype)[..., None]

    def transform_output(self, output: Tensor, weight_sum: Tensor) -> Tensor:
        """A sum of stored channels ``[B, H_kv, N, kept]`` back to ``[B, H_kv, N, D]``, the mean added."""
        state = {name: self._state[name].to(output.dtype) for name in ("mean", "inverse", "deviation")}
        return (output * state["deviation"][:, None]) @ state["inverse"] + weight_sum * state["mean"][:, None]

    # --- state ---
    def state_dict(self) -> dict[str, Tensor]:
        """The transform in float16 and per-channel constants in float32; ``widths`` int8 ``[H_kv, D]``.

        With them ``slots`` int16 ``[planes, 16, 3]`` (``PlaneStream``) where planes hold whatever channels they have room for.
        """
        return {**self._state, "widths": self.widths, **self._places()}

    def _places(self) -> dict[str, Tensor]:
        """What of the state only says where codes lie: nothing where each 16 neighbours are alike, as it always was."""
        if not isinstance(self.layout, PlaneStream) or self.layout.aligned:
            return {}
        return {"slots": self.layout.slots}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over ``state_dict``'s answer. Raises ``CheckpointError`` if bits lie elsewhere."""
        own = self.state_dict()
        missing = [name for name in own if name not in state or state[name].shape != own[name].shape]
        fixed = {"widths": self.widths, **self._places()}
        differ = missing or [name for name, held in fixed.items() if not torch.equal(state[name].cpu(), held.cpu())]
        if differ:
            raise CheckpointError(
                f"the saved state was made with another calibration or other bits, or by an older version that laid codes out "
                f"otherwise ({differ} differ); use what the cache was made with"
            )
        self._state = {name: state[name].to(own[name].dtype).to(own[name].device) for name in self._state}
        self._planes = self._runs = None


def _to_nibbles(codes: Tensor) -> Tensor:
    """Codes below 16, ``[..., tile]``, two a byte: uint8 ``[..., tile // 2]``."""
    low, high = codes.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << GAIN_BITS)


def _from_nibbles(packed: Tensor) -> Tensor:
    """Undo ``_to_nibbles``: uint8 ``[..., tile]``."""
    return torch.cat([packed & (2**GAIN_BITS - 1), packed >> GAIN_BITS], dim=-1)


class CalibratedConfig(QuantizerConfig):
    """``kind = "calibrated"``: what ``fade calibrate`` found out about this model.

    Attributes:
        file: the calibration file, or the name of one that is shipped ("smollm2").
        bits: average bits an element over keys and values of all layers, everything counted; default: the file's.
        side_bits: average bits of this side (keys or values) alone, instead of ``bits``.
        widths: code widths to choose from, 0 included; default: the file's. Even ones suit kernels.
        group: neighbouring channels that share a width; default: the file's.
        levels: "gaussian" levels have the least error (Lloyd-Max); "uniform" ones, at even distances, suit kernels.
    """

    kind: Literal["calibrated"] = "calibrated"
    file: str
    bits: float | None = Field(default=None, gt=0, le=8)  # type: ignore[assignment]
    side_bits: float | None = Field(default=None, gt=0, le=8)
    widths: tuple[int, ...] | None = None
    group: int | None = Field(default=None, ge=1)
    levels: Levels = "gaussian"

    @model_validator(mode="after")
    def _one_knob(self) -> CalibratedConfig:
        if self.bits is not None and self.side_bits is not None:
            raise ValueError("bits (over keys and values) and side_bits (over this side) exclude each other; give one")
        return self

    def with_bits(self, bits: int) -> CalibratedConfig:
        """The same calibration at another average."""
        changed = {**self.model_dump(exclude_unset=True), "kind": self.kind, "bits": bits, "side_bits": None}
        return type(self).model_validate(changed)

    def check_model(self, model: nn.Module) -> None:
        """Refuse a model that the file was not made for, by its output projections. Raises ``CheckpointError``."""
        sketch = sketch_of(model)
        if sketch is not None:
            load_calibration(self.file).check_model(sketch)

    def build(self, context: QuantizerContext) -> Quantizer:
        calibration = load_calibration(self.file)
        try:
            return self._quantizer(calibration, context)
        except ConfigError as error:
            raise ConfigError(f"{context.side} quantizer of layer {context.layer}: {error}") from error

    def _quantizer(self, calibration: Calibration, context: QuantizerContext) -> CalibratedQuantizer:
        found = (calibration.num_layers, calibration.num_kv_heads, calibration.head_dim)
        wanted = (context.num_layers, context.num_kv_heads, context.head_dim)
        if found != wanted:
            raise CheckpointError(
                f"{self.file!r} is for {found[0]} layers of {found[1]} KV heads with head_dim {found[2]}; this "
                f"model has {wanted[0]} layers of {wanted[1]} with head_dim {wanted[2]}. Run 'fade calibrate' "
                f"on this one"
            )
        layers = calibration.sides[context.side]
        if context.layer not in layers:
            raise ConfigError(f"{self.file!r} has no layer {context.layer}; it has {sorted(layers)}")
        own = self.side_bits is not None
        defaults = calibration.defaults
        bits = self.side_bits if own else self.bits if self.bits is not None else defaults["bits"]
        widths = tuple(self.widths if self.widths is not None else defaults["widths"])
        group = self.group if self.group is not None else defaults["group"]
        plan = plan_of(calibration, bits, widths, group, context.side if own else None, self.levels, context.tile)
        return CalibratedQuantizer(
            layers[context.layer],
            plan.widths[context.side][context.layer],
            context.side,
            context.tile,
            context.device,
            self.levels,
        )
