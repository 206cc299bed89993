"""Whether the operations of a step are being recorded, to be run again without Python."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class _Recorded(threading.local):
    on = False


recorded = _Recorded()
"""``torch.compiler.is_compiling() or recorded.on``: what runs now will run again as it is, in a compiled or a captured graph.

Lengths are then read from the device alone, and the host is told nothing. It is written out where it is asked for: a function
would be compiled by itself when an uncompiled frame calls it, and then says yes.
"""


@contextlib.contextmanager
def as_recorded() -> Iterator[None]:
    """Inside the block this thread's operations run as in a compiled graph, whether they are captured or not."""
    recorded.on = True
    try:
        yield
    finally:
        recorded.on = False
