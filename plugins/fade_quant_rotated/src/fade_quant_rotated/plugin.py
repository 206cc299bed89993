"""What this distribution registers with FADE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fade_core import hookimpl
from fade_core.interfaces import Preset, QuantizerConfig, Recipe, TierConfig
from fade_quant_rotated.calibrated import CalibratedConfig
from fade_quant_rotated.product import PQConfig, PQTier
from fade_quant_rotated.rotated import RotatedConfig
from fade_quant_rotated.self_calibrated import SelfCalibratedConfig

if TYPE_CHECKING:
    import typer


@hookimpl
def fade_quantizers() -> Sequence[type[QuantizerConfig]]:
    return [RotatedConfig, CalibratedConfig, SelfCalibratedConfig, PQConfig]


@hookimpl
def fade_tiers() -> Sequence[type[TierConfig]]:
    return [PQTier]


@hookimpl
def fade_presets() -> Sequence[Preset]:
    from fade_quant_rotated.presets import PRESETS

    return PRESETS


@hookimpl
def fade_quality_recipes(calibration: str | None) -> Sequence[Recipe]:
    from fade_quant_rotated.recipes import recipes

    return recipes(calibration)


@hookimpl
def fade_commands(app: typer.Typer) -> None:
    from fade_quant_rotated.commands import calibrate_command, train_codebook_command

    app.command("calibrate")(calibrate_command)
    app.command("train-codebook")(train_codebook_command)
