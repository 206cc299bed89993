"""What a model's config says about the rotary embedding of one of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fade_core.errors import ConfigError
from fade_rope.pairs import Pairing


@dataclass(frozen=True)
class RopeSpec:
    """The numbers that a scheme is built from.

    Attributes:
        kind: name of the scheme.
        theta: base of the geometric series of frequencies.
        head_dim: channels ``D`` of a head.
        rotary_dim: channels that the frequencies are spread over; fewer than ``head_dim`` where rotation is partial.
        pairing: which channels turn together.
        max_length: the model's ``max_position_embeddings``, in tokens; ``None`` if it names none.
        reversed: whether the model turns the other way round (NanoChat).
        axes: which position axis (0 time, 1 height, 2 width) each frequency reads, for multimodal models that
            FADE knows the layout of; empty otherwise.
        parameters: the rest of the model's ``rope_parameters``: factors and lengths by their names there.
    """

    kind: str
    theta: float
    head_dim: int
    rotary_dim: int
    pairing: Pairing = "half"
    max_length: int | None = None
    reversed: bool = False
    axes: tuple[int, ...] = ()
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive parameter, ``default`` if the model's config leaves it out.

        Raises:
            ConfigError: it is missing and has no default, or is not a positive number.
        """
        value = self.parameters.get(name)
        if value is None:
            value = default
        if value is None:
            raise ConfigError(
                f"RoPE {self.kind!r} needs {name!r}, which the model's rope_parameters do not give "
                f"(they give: {', '.join(sorted(self.parameters)) or 'nothing'})"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"RoPE {self.kind!r}: {name}={value!r} must be a number above 0")
        return value

    def optional(self, name: str) -> float | None:
        """A positive parameter, or ``None`` if the config leaves it out. Raises ``ConfigError`` as ``number``."""
        return None if self.parameters.get(name) is None else self.number(name)

    def stretched_theta(self, stretch: Any) -> Any:
        """The base at which the slowest pair turns ``stretch`` (number or tensor) times slower, the fastest as before.

        Raises:
            ConfigError: a single pair turns, which is both.
        """
        if self.rotary_dim <= 2:
            raise ConfigError(f"RoPE {self.kind!r} needs at least 4 rotated channels; found {self.rotary_dim}")
        return self.theta * stretch ** (self.rotary_dim / (self.rotary_dim - 2))

    def trained_length(self) -> int:
        """Tokens of the context before it was extended. Raises ``ConfigError`` if the config does not say."""
        return int(self.number("original_max_position_embeddings", self.max_length))

    def served_length(self) -> int:
        """The model's ``max_position_embeddings``. Raises ``ConfigError`` if the config does not say."""
        if self.max_length is None:
            raise ConfigError(f"RoPE {self.kind!r} needs the model's max_position_embeddings; its config names none")
        return self.max_length
