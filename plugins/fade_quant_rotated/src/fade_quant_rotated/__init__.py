"""Rotated quantizers for FADE's KV cache."""

from fade_quant_rotated.rotated import RotatedConfig, RotatedQuantizer
from fade_quant_rotated.rotation import Rotation

__all__ = ["RotatedConfig", "RotatedQuantizer", "Rotation"]
