"""Rotary embeddings as functions of a position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from fade_core.interfaces.component import ComponentConfig


class RopeScheme(ABC):
    """A rotary embedding as a function of position. All arithmetic in float32.

    Attributes:
        kind: the name it is chosen by; "none" if it leaves everything as it is.
        fixed_until: tokens that a model may have seen before its frequencies change; ``None`` if they never do.
    """

    kind: ClassVar[str] = ""

    @property
    def fixed_until(self) -> int | None:
        """``None`` unless a scheme says otherwise."""
        return None

    @abstractmethod
    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply the embedding to ``[B, H, T, D]`` at int ``positions`` (broadcastable to ``[B, H, T]``)."""

    @abstractmethod
    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo ``rotate``."""

    def shift(self, x: Tensor, offset: Tensor) -> Tensor:
        """Move already rotated ``x`` by ``offset`` positions (``unrotate`` then ``rotate`` for plain rotations)."""
        return self.rotate(x, offset)


class RopeConfig(ComponentConfig):
    """Configuration of a RoPE scheme."""

    kind: str

    def build(self, model_config: Any, layer_idx: int | None = None) -> RopeScheme:
        """The scheme of a layer of a model, given its (text) config; ``None`` for that of its full-attention layers.

        Raises:
            ConfigError: if they do not match.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build(model_config, layer_idx=None)")
