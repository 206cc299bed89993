"""What this distribution registers with FADE. Triton itself is imported when a kernel first runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fade_core import hookimpl

if TYPE_CHECKING:
    from fade_core.interfaces import Kernel


@hookimpl
def fade_kernels() -> Sequence[type[Kernel]]:
    from fade_kernels_triton.kernel import TritonDecodeAttention

    return [TritonDecodeAttention]
