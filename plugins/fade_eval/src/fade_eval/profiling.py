"""For how long a decode step keeps the GPU busy, and with which kernels."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

OPS = {
    "append": ("append_",),
    "attention": ("decode_", "merge_", "turn_", "planes_", "finish_"),
    "encode": ("encode_",),
    "mass": ("mass_", "window_mass_"),
}
"""What the names of kernels begin with, by what they are for."""
PROFILED = 5
"""Steps that are profiled after the timed ones."""


def can_profile(device: torch.device) -> bool:
    """Whether the time of kernels can be told."""
    return device.type == "cuda"


class Kernels:
    """Kernels of ``PROFILED`` steps, a profile each, so that the median tells of a step that neither ranks nor encodes.

    Args:
        start: token after which the first of these steps begins; ``None`` to profile nothing.

    Attributes:
        at: what is to be called when a token is there, by its number.
    """

    def __init__(self, start: int | None) -> None:
        self.at = dict[int, Callable[[], None]]()
        if start is not None:
            self.at = {start + step: self._next for step in range(PROFILED)} | {start + PROFILED: self.stop}
        self._running: Any = None
        self._busy, self._ops = list[float](), dict.fromkeys([*OPS, "other"], 0.0)

    @property
    def busy_ms(self) -> float | None:
        """Median over the steps of the time in which a kernel ran; ``None`` if the profiler saw none in any of them."""
        return statistics.median(self._busy) if self._busy else None

    @property
    def shares(self) -> dict[str, float]:
        """Of the kernels' time in all steps, by the names in ``OPS``; empty if no kernel ran."""
        whole = sum(self._ops.values())
        return {op: part / whole for op, part in self._ops.items()} if whole else {}

    def _next(self) -> None:
        self.stop()
        self._running = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
        self._running.start()

    def stop(self) -> None:
        """End the profile that is running, if one is."""
        if self._running is None:
            return
        self._running.stop()
        spans = []
        for event in self._running.events():
            if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False):
                spans.append((event.time_range.start, event.time_range.end))
                op = next((op for op, names in OPS.items() if event.name.startswith(names)), "other")
                self._ops[op] += event.time_range.end - event.time_range.start
        if spans:  # every step runs kernels: a profile without one missed them
            self._busy.append(covered(spans) / 1e3)
        self._running = None


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    length, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return length
