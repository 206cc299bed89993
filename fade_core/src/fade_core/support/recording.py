"""Whether the operations of a step are being recorded, to be run again without Python."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

_here = threading.local()


def recording() -> bool:
    """Whether what runs now will run again as it is: inside a graph of the compiler, or inside ``as_recorded``.

    Lengths are then read from the device alone, and the host is told nothing.
    """
    return torch.compiler.is_compiling() or getattr(_here, "on", False)


@contextlib.contextmanager
def as_recorded() -> Iterator[None]:
    """Inside the block this thread's operations run as in a compiled graph, whether they are captured or not."""
    _here.on = True
    try:
        yield
    finally:
        _here.on = False
