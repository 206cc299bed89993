"""``kind = "self-calibrated"``: the calibrated codes, learnt from each prompt as it is read; no file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fade_core.errors import CheckpointError, ConfigError
from fade_core.interfaces import PlaneLayout, PromptView, Quantizer, QuantizerConfig, QuantizerContext, RunLayout, Side
from fade_core.packed import WORD_BITS, Packed
from fade_quant_rotated.allocation import WIDTHS, check_widths, water_fill
from fade_quant_rotated.calibrated import CalibratedQuantizer
from fade_quant_rotated.calibration import GAIN_BITS, SideCalibration
from fade_quant_rotated.learning import Learning
from fade_quant_rotated.levels import check_tokens
from fade_quant_rotated.lloyd_max import Levels
from fade_quant_rotated.planes import PLANE_BITS, PLANE_CHANNELS, in_planes, plane_words, row_of
from fade_quant_rotated.reach import REACH
from fade_quant_rotated.rotation import Rotation

TOKENS_A_CHANNEL = 1
"""Fewest tokens a channel, outside the sinks, that are learnt from; ``shrunk`` makes up for their number."""


class SelfCalibratedQuantizer(CalibratedQuantizer):
    """``CalibratedQuantizer`` whose transform and widths come from the prompt's own attention.

    Storage is allocated before the first token is seen, so the bits of a layer and side are fixed; what is learnt is how
    its heads and channels share them. One transform serves all rows of a batch, learnt from the real tokens of all of
    them. It never changes while tokens are held; an emptied cache learns anew.

    Where tokens must be encoded before enough of them were seen at once (a short prompt and a long answer, small chunks,
    attention that is not FADE's), the codes make do with a Hadamard rotation about the mean of the first of them, all
    channels alike, and ``shortcoming`` says why.

    Args:
        head_dim: channels ``D``.
        bits: average bits an element, everything but the transform counted.
        side: "key" or "value".
        widths: code widths to choose from, 0 among them.
        group: neighbouring channels that share a width.
        tile: tokens a tile.
        device: where tokens will be.
        levels: which levels codes stand for; "uniform" ones take a kernel less work.
        reach: positions after the prompt's that the codes are to serve, where it is known how positions turn keys.
        heads: KV heads of the layer: rows are as long as the whole planes of all of them that fit into ``bits``.

    Raises:
        ConfigError: bits that the widths cannot give, or a group that does not divide ``D``.
    """

    kind: ClassVar[str] = "self-calibrated"
    learns: ClassVar[bool] = True
    _learning: Learning | None

    def __init__(
        self,
        head_dim: int,
        bits: float = 2.0,
        side: Side = "key",
        widths: tuple[int, ...] = WIDTHS,
        group: int = 1,
        tile: int = 64,
        device: torch.device | None = None,
        levels: Levels = "gaussian",
        reach: int = REACH,
        heads: int = 1,
    ) -> None:
        self.levels, self.reach = levels, reach
        self.head_dim, self.tile, self.side, self.device = head_dim, tile, side, device
        self.choice, self.group = check_widths(widths), group
        self.row = int((bits - GAIN_BITS / head_dim) * tile * head_dim / WORD_BITS + 1e-9)
        self._in_planes = in_planes(self.choice, levels, group)
        if self._in_planes:
            planes = self.row * heads // plane_words(tile)
            while row_of(planes, heads, tile) > self.row:  # kernels read rows of whole 16 words
                planes -= 1
            self.row = row_of(planes, heads, tile)
        if bits * head_dim < GAIN_BITS or self.channel_bits > self.choice[-1]:
            raise ConfigError(
                f"bits={bits:g} an element cannot be had: gains take {GAIN_BITS / head_dim:.3f}, and the codes have "
                f"widths {list(self.choice)}"
            )
        if self._in_planes and not self.row:
            least = (row_of(1, heads, tile) * WORD_BITS / tile + GAIN_BITS) / head_dim
            raise ConfigError(
                f"bits={bits:g} an element have no room for a plane of 32 bits a token beside the gains of {heads} heads; "
                f"ask for {math.ceil(least * 100) / 100:g} or more"
            )
        water_fill(torch.ones(1, head_dim), 0, self.choice, group)  # refuses a group that does not divide D
        self.forget()

    @property
    def channel_bits(self) -> float:
        """Average width of a channel that the rows have room for."""
        return self.row * WORD_BITS / (self.tile * self.head_dim)

    @property
    def bits_per_element(self) -> float:
        return self.channel_bits + GAIN_BITS / self.head_dim

    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"codes": ((self.row,), torch.int16), "gain": ((self.tile // 2,), torch.uint8)}

    # --- learning ---
    def observe(self, prompt: PromptView) -> None:
        """Learn from a prompt. The host goes on meanwhile, until it asks for anything that was learnt."""
        needed = TOKENS_A_CHANNEL * self.head_dim
        self._learning = prompt.once(f"{__name__} {self.reach}", lambda: Learning(prompt, needed, self.reach))

    def _finish_learning(self) -> None:
        learning, self._learning = self._learning, None
        if learning is None:
            return
        if isinstance(learning.found, str):
            self._why_not = learning.found
        else:
            calibration, inverse, worth = learning.found[self.side]
            self._adopt(calibration, self._share(worth), inverse)

    def forget(self) -> None:
        self._state: dict[str, Tensor] = {}
        self._planes = self._runs = None
        self._learning = None
        self._why_not = "tokens had to be encoded before a prompt was seen"
        self.shortcoming = ""

    def encode(self, x: Tensor) -> Packed:
        check_tokens(x, self.head_dim, f"quantizer {self.kind!r}")
        self._finish_learning()
        if not self._state:
            calibration = _rotation_about_the_mean(x.float().cpu())
            self._adopt(calibration, self._share(calibration.worth))
            self.shortcoming = f"{self._why_not}: a plain rotation makes do"
        return super().encode(x)

    def _share(self, worth: Tensor) -> Tensor:
        """Widths ``[H_kv, D]`` of channels of ``worth`` (on the CPU) that the rows have room for."""
        return water_fill(worth, self._bits_for(len(worth)), self.choice, self.group)

    def _bits_for(self, heads: int) -> float:
        """Average width of a channel that the rows of so many heads have room for: of whole planes where codes lie in those."""
        if not self._in_planes:
            return self.channel_bits
        planes = self.row * heads // plane_words(self.tile)
        return planes * PLANE_CHANNELS * PLANE_BITS / (heads * self.head_dim)

    def planes(self) -> PlaneLayout | None:
        """As ``CalibratedQuantizer``'s, of what was learnt; ``None`` before."""
        self._finish_learning()
        return super().planes() if self._state else None

    def runs(self) -> RunLayout | None:
        """As ``CalibratedQuantizer``'s, of what was learnt; ``None`` before."""
        self._finish_learning()
        return super().runs() if self._state else None

    # --- state ---
    def state_dict(self) -> dict[str, Tensor]:
        """As ``CalibratedQuantizer``'s; empty while nothing was learnt."""
        self._finish_learning()
        return super().state_dict() if self._state else {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over ``state_dict``'s answer, widths included. Raises ``CheckpointError`` if it does not fit here."""
        self.forget()
        if not state:
            return
        widths = state.get("widths")
        if widths is None or not self._has_room(widths.cpu().long()):
            found = None if widths is None else f"{tuple(widths.shape)}, {float(widths.double().mean()):.2f} on average"
            raise CheckpointError(
                f"widths [H_kv, {self.head_dim}] from {list(self.choice)}, {self.channel_bits:.2f} on average at most, are "
                f"needed; the saved state has {found}"
            )
        heads = widths.shape[0]
        blank = torch.zeros(heads, self.head_dim)
        square = torch.eye(self.head_dim).expand(heads, -1, -1)
        self._adopt(SideCalibration(blank, square, blank, blank, blank), widths.cpu().long())
        try:
            super().load_state_dict(state)
        except CheckpointError:
            self.forget()
            raise

    def _has_room(self, widths: Tensor) -> bool:
        if widths.dim() != 2 or widths.shape[1] != self.head_dim:
            return False
        allowed = bool(torch.isin(widths, torch.tensor(self.choice)).all())
        return allowed and float(widths.double().mean()) <= self._bits_for(len(widths)) + 1e-9


def _rotation_about_the_mean(x: Tensor) -> SideCalibration:
    """What stands in for a calibration: tokens ``[B, H_kv, T, D]`` give each head its mean and its scale."""
    tokens = x.transpose(0, 1).flatten(1, 2)
    heads, _, dim = tokens.shape
    mean = tokens.mean(1)
    size = (tokens - mean[:, None]).square().mean((1, 2)).sqrt().clamp_min(1e-6)
    falling = 1 - 1e-6 * torch.arange(dim)  # bits that do not go round are spread over the heads
    return SideCalibration(
        mean=mean,
        transform=Rotation(dim).forward(torch.eye(dim)).expand(heads, -1, -1).half(),
        deviation=size[:, None].expand(-1, dim),
        spread=torch.ones(heads, dim),
        worth=falling.expand(heads, -1),
    )


class SelfCalibratedConfig(QuantizerConfig):
    """``kind = "self-calibrated"``: what ``kind = "calibrated"`` does, learnt from each prompt instead of a file.

    Attributes:
        bits: average bits an element of this side (keys or values), the same in all layers. Keys deserve more.
        widths: code widths to choose from, 0 included. Even ones suit kernels.
        group: neighbouring channels that share a width.
        levels: "gaussian" levels have the least error (Lloyd-Max); "uniform" ones, at even distances, suit kernels.
        reach: positions after the prompt that codes are to serve: what the prompt tells is averaged over them by the model's
            rotary embedding (with fade-rope installed). Smaller is closer for short answers.
    """

    kind: Literal["self-calibrated"] = "self-calibrated"
    bits: float = Field(default=2.0, gt=0, le=8)  # type: ignore[assignment]
    widths: tuple[int, ...] = WIDTHS
    group: int = Field(default=1, ge=1)
    levels: Levels = "gaussian"
    reach: int = Field(default=REACH, ge=0)

    def build(self, context: QuantizerContext) -> Quantizer:
        try:
            return SelfCalibratedQuantizer(
                context.head_dim,
                self.bits,
                context.side,
                self.widths,
                self.group,
                context.tile,
                context.device,
                self.levels,
                self.reach,
                context.num_kv_heads,
            )
        except ConfigError as error:
            raise ConfigError(f"{context.side} quantizer of layer {context.layer}: {error}") from error
