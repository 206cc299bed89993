"""What this distribution registers with FADE. The compiler is looked for when a cache is first built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fade_core import hookimpl

if TYPE_CHECKING:
    from fade_core.interfaces import Kernel


@hookimpl
def fade_kernels() -> Sequence[type[Kernel]]:
    from fade_kernels_cpu.kernel import CpuDecodeAttention

    return [CpuDecodeAttention]
