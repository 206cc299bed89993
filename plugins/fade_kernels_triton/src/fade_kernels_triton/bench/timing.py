"""Microseconds a layer: CUDA graphs over the buffers of many layers, so that nothing is found in the L2 cache."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

MEGABYTE = 2**20
TRAFFIC = 700 * MEGABYTE
"""Bytes that the layers of one timed graph read: many times the L2 cache."""

MAX_LAYERS = 64
COPY = 4096 * MEGABYTE

Call = Callable[[], object]
Timer = Callable[[Sequence[Call], int], float]
"""Microseconds a call, from the calls of one graph and the number of replays."""


@dataclass(frozen=True)
class Budget:
    """Seconds that a command may take, from when this is made; ``None`` for as long as it takes."""

    seconds: float | None = None
    clock: Callable[[], float] = time.monotonic
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "begun", self.clock())

    @property
    def spent(self) -> bool:
        """Whether nothing new should begin."""
        return self.seconds is not None and self.clock() - self.begun > self.seconds


def layers_for(nbytes: int) -> int:
    """Layers of ``nbytes`` each that one graph runs."""
    return max(2, min(MAX_LAYERS, -(-TRAFFIC // nbytes)))


def graph_time(calls: Sequence[Call], replays: int) -> float:
    """Microseconds a call of one CUDA graph that makes all ``calls``; median over ``replays``."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def terabytes(nbytes: int, us: float) -> float:
    """TB/s of ``nbytes`` in ``us`` microseconds."""
    return nbytes / us / 1e6


def copy_bandwidth(device: torch.device, timer: Timer, nbytes: int) -> float:
    """TB/s of copying ``nbytes``, bytes read plus bytes written."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return terabytes(2 * nbytes, timer([lambda: target.copy_(source)], 7))


def copy_size(device: torch.device) -> int:
    """Bytes worth copying on a CUDA device: 4 GiB, or a quarter of what is free."""
    return min(COPY, torch.cuda.mem_get_info(device)[0] // 4)
