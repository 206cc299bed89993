"""Events out of the cache, and who receives them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fade_core.interfaces.component import ComponentConfig


@dataclass(frozen=True)
class Event:
    """Something that happened to the cache.

    Attributes:
        kind: "encode", "demote", "evict", "reassign", "fallback" or "rollback".
        layer: layer index.
        tokens: tokens concerned, summed over rows and heads.
        bytes_before: bytes the layer held before.
        bytes_after: bytes the layer holds after.
        seconds: time it took.
        detail: anything else, JSON-serialisable.
    """

    kind: str
    layer: int
    tokens: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)


class TelemetrySink(ABC):
    """Receives events. Never called once a token: only when tiles move."""

    @abstractmethod
    def emit(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:  # noqa: B027 (nothing to release is a good answer)
        """Flush and release what is held."""


class TelemetrySinkConfig(ComponentConfig):
    """Configuration of a telemetry sink. Subclasses set ``kind: Literal["name"] = "name"`` and ``build``."""

    kind: str

    def build(self) -> TelemetrySink:
        """The sink. Raises ``ConfigError`` if it cannot open what it writes to."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")
