"""Events out of the cache: when tiles are encoded, demoted, evicted, re-ranked or rolled back."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Protocol

from fade_core.errors import ConfigError, InputError
from fade_core.interfaces import Event, TelemetrySink, TelemetrySinkConfig


class HasSinks(Protocol):
    """What sends events: a ``TieredKVCache``."""

    sinks: list[TelemetrySink]


def attach_telemetry(cache: HasSinks, sink: TelemetrySink) -> None:
    """Send the cache's events to ``sink`` from now on, beside the sinks of its configuration."""
    cache.sinks.append(sink)


class JsonlExporter(TelemetrySink):
    """One JSON object a line, flushed at every event.

    Args:
        path: file to append to.

    Raises:
        ConfigError: if the file cannot be opened for writing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"telemetry cannot write to {self.path}: {error.strerror}; name a writable file"
            ) from error

    def emit(self, event: Event) -> None:
        if self._file.closed:
            raise InputError(f"telemetry to {self.path} is closed; attach a new exporter")
        self._file.write(json.dumps(asdict(event)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class JsonlConfig(TelemetrySinkConfig):
    """``kind = "jsonl"``: events as JSON lines.

    Attributes:
        path: file to append to.
    """

    kind: Literal["jsonl"] = "jsonl"
    path: str

    def build(self) -> JsonlExporter:
        return JsonlExporter(self.path)


class Collector(TelemetrySink):
    """Keeps events in memory: for tests and reports."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def counts(self) -> dict[str, int]:
        """Events of each kind."""
        return dict(Counter(event.kind for event in self.events))

    def tokens(self) -> dict[str, int]:
        """Tokens concerned, by kind."""
        sums: dict[str, int] = {}
        for event in self.events:
            sums[event.kind] = sums.get(event.kind, 0) + event.tokens
        return sums

    def to_dict(self) -> dict[str, Any]:
        """Counts and tokens for JSON."""
        return {"events": self.counts(), "tokens": self.tokens()}
