"""What this distribution registers with FADE."""

from __future__ import annotations

from collections.abc import Sequence

from fade_core import hookimpl
from fade_core.interfaces import QuantizerConfig

from fade_quant_rotated.rotated import RotatedConfig


@hookimpl
def fade_quantizers() -> Sequence[type[QuantizerConfig]]:
    """Quantizers for keys and values."""
    return [RotatedConfig]
