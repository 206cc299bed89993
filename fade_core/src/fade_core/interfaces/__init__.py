"""What a plugin implements. Nothing here imports transformers.

Shapes: ``B`` rows, ``H_q`` query heads, ``H_kv`` key/value heads, ``T`` tokens, ``D`` channels of a head.
"""

from __future__ import annotations

from fade_core.interfaces.component import ComponentConfig
from fade_core.interfaces.kernel import Kernel, KernelConfig, Op, Support
from fade_core.interfaces.layouts import PlainEncoding, PlaneLayout, RunLayout
from fade_core.interfaces.policy import EvictionPolicy, LayerView, PolicyConfig, PyramidSchedule
from fade_core.interfaces.quantizer import PromptView, Quantizer, QuantizerConfig, QuantizerContext, Side
from fade_core.interfaces.recipe import Preset, Recipe
from fade_core.interfaces.rope import RopeConfig, RopeScheme
from fade_core.interfaces.telemetry import Event, TelemetrySink, TelemetrySinkConfig
from fade_core.interfaces.tier import Tier, TierConfig

__all__ = [
    "ComponentConfig",
    "Event",
    "EvictionPolicy",
    "Kernel",
    "KernelConfig",
    "LayerView",
    "Op",
    "PlainEncoding",
    "PlaneLayout",
    "PolicyConfig",
    "Preset",
    "PromptView",
    "PyramidSchedule",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerContext",
    "Recipe",
    "RopeConfig",
    "RopeScheme",
    "RunLayout",
    "Side",
    "Support",
    "TelemetrySink",
    "TelemetrySinkConfig",
    "Tier",
    "TierConfig",
]
