"""Embeddings whose frequencies depend on how much the model has read."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_rope.rotary import Rotary
from fade_rope.shapes import per_token


class GrowingRotary(Rotary):
    """One set of frequencies up to the trained length, another beyond.

    A model applies to a whole forward pass the frequencies of the longest position in it, and leaves keys already in
    the cache as they are. So keys of one cache may have been rotated under different lengths: give ``length`` a token.
    """

    @property
    @abstractmethod
    def threshold(self) -> int:
        """The last length, in tokens, at which the trained frequencies hold."""

    @property
    def fixed_until(self) -> int | None:
        """The threshold."""
        return self.threshold

    @abstractmethod
    def extended(self, length: Tensor) -> Tensor:
        """Frequencies beyond the threshold: ``[P]`` for a 0-dim int64 ``length``, ``[..., P]`` for ``[..., 1]``."""

    def inv_freq_at(self, length: Tensor | None, device: torch.device) -> Tensor:
        trained = super().inv_freq_at(None, device)
        if length is None:
            return trained
        length = length[..., None] if length.numel() > 1 else length.reshape(())
        return torch.where(length > self.threshold, self.signed(self.extended(length)), trained)

    def length_of_shift(self, x: Tensor, offset: Tensor, length: Tensor | int | None) -> Tensor | None:
        if length is not None:
            return per_token(length, x, "length")
        furthest = int(offset.abs().amax()) if offset.numel() else 0
        if furthest >= self.threshold:
            raise InputError(
                f"a shift by {furthest} leaves the {self.threshold} tokens that RoPE {self.kind!r} was trained at, and "
                f"its frequencies change there; pass positions= (where the keys are) or length= (tokens seen)"
            )
        return None
