"""The rotary embedding (RoFormer, arXiv 2104.09864): what all schemes have in common."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fade_core.errors import ConfigError
from fade_core.interfaces import RopeScheme
from fade_rope.pairs import reduced, turn
from fade_rope.shapes import check_heads, per_token
from fade_rope.spec import RopeSpec


def geometric(theta: float | Tensor, rotary_dim: int, spread: int | None = None) -> Tensor:
    """``theta ** (-2i / spread)``: float32 ``[ceil(rotary_dim / 2)]``, radians a token.

    Angles at position 100,000 magnify the last bit of a frequency to 0.006 radians, so this rounds where the models
    round: exponent, power and reciprocal in float32.
    """
    exponent = torch.arange(0, rotary_dim, 2).float() / (spread or rotary_dim)
    return 1.0 / theta ** (exponent if isinstance(theta, float) else exponent.to(theta.device))


def newest(positions: Tensor) -> Tensor | None:
    """Tokens that a model has seen once it reached the largest of ``positions``; ``None`` of no positions."""
    return positions.amax() + 1 if positions.numel() else None


class Rotary(RopeScheme):
    """Turns channel pair ``i`` of a token at position ``p`` by ``p * inv_freq[i]`` radians.

    ``rotate`` repeats the model's own rounding (angles in float32), so that it gives the keys that the model would
    have cached. Subclasses override ``frequencies`` and, where queries and keys are also scaled, ``scaling``.

    Attributes:
        kind: the name it is chosen by.
        spec: what it was built from.
        head_dim: channels ``D``.
        rotary_dim: channels that turn; the rest pass through.
        inv_freq: float32 ``[rotary_dim / 2]``, radians a token.
        attention_scaling: factor on rotated keys and queries (yarn and longrope; 1 elsewhere).
    """

    kind: ClassVar[str] = ""

    def __init__(self, spec: RopeSpec) -> None:
        self.spec = spec
        self.head_dim = spec.head_dim
        self.inv_freq = self.signed(self.frequencies())
        self._placed = {self.inv_freq.device: self.inv_freq}
        self.attention_scaling = self.scaling()
        self.rotary_dim = 2 * self.inv_freq.shape[-1]
        if not 0 < self.rotary_dim <= self.head_dim:
            raise ConfigError(f"RoPE {self.kind!r} would turn {self.rotary_dim} of {self.head_dim} channels of a head")

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(theta={self.spec.theta:g}, channels={self.rotary_dim}/{self.head_dim}, "
            f"pairs={self.spec.pairing!r}, scaling={self.attention_scaling:g})"
        )

    # --- what a family defines ---
    def frequencies(self) -> Tensor:
        """Float32 ``[P]``, radians a token of each pair."""
        return geometric(self.spec.theta, self.spec.rotary_dim)

    def scaling(self) -> float:
        """Factor on rotated keys and queries."""
        return 1.0

    def inv_freq_at(self, length: Tensor | None, device: torch.device) -> Tensor:
        """Frequencies ``[P]`` or ``[b, h, t, P]`` in force when the model had seen ``length`` tokens."""
        if device not in self._placed:
            self._placed[device] = self.inv_freq.to(device)
        return self._placed[device]

    # --- RopeScheme ---
    def rotate(self, x: Tensor, positions: Tensor | int, length: Tensor | int | None = None) -> Tensor:
        """Apply the embedding, attention scaling included.

        Args:
            x: keys or queries ``[B, H, T, D]``, any floating dtype; computed in float32, returned in its own dtype.
            positions: integers ``[T]``, ``[B, T]`` or ``[B, H, T]``.
            length: tokens that the model had seen when it rotated each token, as ``positions`` or one integer. Only
                "dynamic" and "longrope" depend on it; by default the largest position plus one, as in one forward pass.

        Raises:
            InputError: a shape or dtype that does not fit.
        """
        check_heads(x, self.head_dim)
        return self.turn_by(x, self.angles(x, positions, length))

    def unrotate(self, x: Tensor, positions: Tensor | int, length: Tensor | int | None = None) -> Tensor:
        """Undo ``rotate``, attention scaling included. Arguments and errors as there."""
        check_heads(x, self.head_dim)
        return self.turn_back(x, self.angles(x, positions, length))

    def shift(
        self,
        x: Tensor,
        offset: Tensor | int,
        positions: Tensor | int | None = None,
        length: Tensor | int | None = None,
    ) -> Tensor:
        """Move rotated ``x`` by ``offset`` positions; what attention scaling it carries stays.

        Args:
            x: rotated keys or queries ``[B, H, T, D]``.
            offset: integers ``[T]``, ``[B, T]`` or ``[B, H, T]``, of any sign.
            positions: where the tokens are now. With them the result equals ``rotate`` at ``positions + offset`` to
                the last bits; without, only up to the rounding of the model's own angles, ``6e-8 * position`` radians.
            length: as in ``rotate``; by default ``max(positions) + 1`` if they are given.

        Raises:
            InputError: a shape or dtype that does not fit, or a length-dependent scheme that is moved further than
                its trained length without being told where or when.
        """
        check_heads(x, self.head_dim)
        moved = per_token(offset, x, "offset")
        if positions is None:
            inv_freq = self.inv_freq_at(self.length_of_shift(x, moved, length), x.device)
            angle = moved[..., None].double() * inv_freq.double()
        else:
            start = per_token(positions, x, "positions")
            end = start + moved
            when = newest(torch.cat([start.flatten(), end.flatten()])) if length is None else length
            angle = self.angles(x, end, when).double() - self.angles(x, start, when).double()
        angle = reduced(angle)
        return turn(x, angle.cos(), angle.sin(), self.spec.pairing)

    # --- parts ---
    def angles(self, x: Tensor, positions: Tensor | int, length: Tensor | int | None = None) -> Tensor:
        """Angle of every pair in float32 radians, ``[b, h, t, P]``, rounded as the models round it."""
        at = per_token(positions, x, "positions")
        when = newest(at) if length is None else per_token(length, x, "length")
        return at[..., None].float() * self.inv_freq_at(when, x.device)

    def length_of_shift(self, x: Tensor, offset: Tensor, length: Tensor | int | None) -> Tensor | None:
        """The length whose frequencies a shift without positions uses; ``None`` means those of the trained length."""
        return None if length is None else per_token(length, x, "length")

    def signed(self, inv_freq: Tensor) -> Tensor:
        """``inv_freq``, negated for a model that turns the other way."""
        return -inv_freq if self.spec.reversed else inv_freq

    def turn_by(self, x: Tensor, angle: Tensor) -> Tensor:
        """Turn pairs by float32 ``angle [b, h, t, P]`` and scale."""
        scale = self.attention_scaling
        return turn(x, angle.cos() * scale, angle.sin() * scale, self.spec.pairing)

    def turn_back(self, x: Tensor, angle: Tensor) -> Tensor:
        """Undo ``turn_by``."""
        scale = self.attention_scaling
        return turn(x, angle.cos() / scale, -angle.sin() / scale, self.spec.pairing)
