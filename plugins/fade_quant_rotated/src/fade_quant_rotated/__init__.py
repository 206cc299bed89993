"""Rotated, calibrated and product quantizers for FADE's KV cache."""

from fade_quant_rotated.calibrated import CalibratedConfig, CalibratedQuantizer
from fade_quant_rotated.calibration import Calibration
from fade_quant_rotated.codebook import PQCodebook, load_codebooks, save_codebooks
from fade_quant_rotated.product import PQConfig, PQQuantizer
from fade_quant_rotated.rotated import RotatedConfig, RotatedQuantizer
from fade_quant_rotated.rotation import Rotation
from fade_quant_rotated.self_calibrated import SelfCalibratedConfig, SelfCalibratedQuantizer

__all__ = [
    "CalibratedConfig",
    "CalibratedQuantizer",
    "Calibration",
    "PQCodebook",
    "PQConfig",
    "PQQuantizer",
    "RotatedConfig",
    "RotatedQuantizer",
    "Rotation",
    "SelfCalibratedConfig",
    "SelfCalibratedQuantizer",
    "load_codebooks",
    "save_codebooks",
]
