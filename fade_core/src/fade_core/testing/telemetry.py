"""Conformance of telemetry sinks: every event is taken, nothing raises into the cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fade_core.errors import FadeError, InputError
from fade_core.interfaces import Event, TelemetrySink, TelemetrySinkConfig
from fade_core.plugins.resolve import resolve
from fade_core.testing.checks import CheckFailedError, CheckResult, Suite, fresh_seed, require

KINDS = ("encode", "demote", "evict", "reassign", "fallback", "rollback")


@dataclass
class SinkCase:
    """A sink under test and the generator of its inputs."""

    build: Callable[[], TelemetrySink]
    generator: torch.Generator

    def events(self) -> list[Event]:
        """One event of every kind, with everything that ``detail`` may hold."""
        details: tuple[Mapping[str, Any], ...] = (
            {},
            {"length": 5},
            {"nested": {"a": [1, 2.5, None, "ü\n"]}, "ok": True},
        )
        sizes = torch.randint(0, 2**40, (len(KINDS) * len(details), 3), generator=self.generator).tolist()
        return [
            Event(kind, index, tokens, before, after, 1e-6 * index, detail)
            for index, ((kind, detail), (tokens, before, after)) in enumerate(
                zip([(kind, detail) for kind in KINDS for detail in details], sizes, strict=True)
            )
        ]


def check_telemetry_sink(
    sink: TelemetrySinkConfig | str | Callable[[], TelemetrySink],
    *,
    seed: int | None = None,
    expected_failures: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    only: tuple[str, ...] = (),
) -> list[CheckResult]:
    """Check a telemetry sink against ``fade_core.interfaces.TelemetrySink``.

    Args:
        sink: its configuration, the name it is installed under (if it needs no fields), or a function that builds it.
            A function must give a sink that is ready each time it is called.
        seed: of the events; ``None`` draws one.
        expected_failures: checks that are known to fail, with the reason.
        progress: called as checks are done.
        only: names of the checks to run; empty for all.
    """
    build = _factory(sink)
    return SINK_CHECKS.run(
        lambda generator: SinkCase(build, generator),
        fresh_seed() if seed is None else seed,
        expected_failures,
        progress,
        only,
    )


# --- the checks ---


def every_kind(case: SinkCase) -> None:
    """Events of every kind and with nested details are taken; emit() returns nothing."""
    sink = case.build()
    for event in case.events():
        require(sink.emit(event) is None, f"emit() returned something for {event.kind!r}")
    sink.close()


def events_kept(case: SinkCase) -> None:
    """emit() does not change the event's details."""
    sink = case.build()
    given = {"nested": {"a": [1, 2]}}
    sink.emit(Event("encode", 0, detail=given))
    sink.close()
    require(given == {"nested": {"a": [1, 2]}}, f"detail became {given}")


def many_events(case: SinkCase) -> None:
    """A thousand events in a row are taken."""
    sink, events = case.build(), case.events()
    for number in range(1000):
        sink.emit(events[number % len(events)])
    sink.close()


def closing(case: SinkCase) -> None:
    """close() works without any event and twice; emitting afterwards is taken, ignored or a FadeError."""
    case.build().close()
    sink = case.build()
    sink.emit(case.events()[0])
    sink.close()
    sink.close()
    try:
        sink.emit(case.events()[1])
    except FadeError:
        pass
    except Exception as error:
        raise CheckFailedError(f"emit() after close() raised {type(error).__name__}: {error}") from error


SINK_CHECKS: Suite[SinkCase] = Suite((every_kind, events_kept, many_events, closing))


def _factory(sink: Any) -> Callable[[], TelemetrySink]:
    if isinstance(sink, str):
        sink = resolve("telemetry_sinks", {"kind": sink})
    if isinstance(sink, TelemetrySinkConfig):
        return sink.build
    if callable(sink):
        factory: Callable[[], TelemetrySink] = sink
        return factory
    raise InputError(f"a telemetry sink's configuration, name or factory is needed; found {sink!r}")
