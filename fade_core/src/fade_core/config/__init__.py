"""What a user writes: ``FadeConfig``, its presets, its flat spelling and its files."""

from __future__ import annotations

from fade_core.config.fade_config import LAYER_KEY, FadeConfig, LayerOverride, Rung

__all__ = ["LAYER_KEY", "FadeConfig", "LayerOverride", "Rung"]
