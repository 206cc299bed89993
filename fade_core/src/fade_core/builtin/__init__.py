"""What the core brings, through the same door as every plugin. Imports inside the hooks keep start-up light."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fade_core.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from fade_core.interfaces import Kernel, PolicyConfig, Preset, QuantizerConfig, TelemetrySinkConfig, TierConfig


@hookimpl
def fade_tiers() -> Sequence[type[TierConfig]]:
    from fade_core.builtin.tiers import EvictedTier, FullTier, Int2Tier, Int4Tier, PackedTier

    return [FullTier, PackedTier, Int4Tier, Int2Tier, EvictedTier]


@hookimpl
def fade_quantizers() -> Sequence[type[QuantizerConfig]]:
    from fade_core.builtin.quantizers.kivi import KiviConfig
    from fade_core.builtin.quantizers.uniform import UniformConfig

    return [UniformConfig, KiviConfig]


@hookimpl
def fade_policies() -> Sequence[type[PolicyConfig]]:
    from fade_core.builtin.policies.ema import EmaConfig
    from fade_core.builtin.policies.h2o import H2OConfig
    from fade_core.builtin.policies.position import PositionConfig

    return [PositionConfig, H2OConfig, EmaConfig]


@hookimpl
def fade_kernels() -> Sequence[type[Kernel]]:
    from fade_core.ops.reference import TorchAppend, TorchAttentionMass, TorchDecodeAttention
    from fade_core.storage.codec import TorchDequantize, TorchEncode

    return [TorchDecodeAttention, TorchAttentionMass, TorchAppend, TorchEncode, TorchDequantize]


@hookimpl
def fade_telemetry_sinks() -> Sequence[type[TelemetrySinkConfig]]:
    from fade_core.builtin.telemetry import JsonlConfig

    return [JsonlConfig]


@hookimpl
def fade_presets() -> Sequence[Preset]:
    from fade_core.builtin.presets import PRESETS

    return PRESETS
