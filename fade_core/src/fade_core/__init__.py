"""FADE: a compressed KV cache for transformers, made of parts that plugins replace.

Names are imported on first use: ``import fade_core`` costs nothing, and a plugin that imports ``hookimpl`` from here
while the registry loads it meets no cycle.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fade_core._version import __version__

if TYPE_CHECKING:
    from fade_core.builtin.telemetry import JsonlExporter, attach_telemetry
    from fade_core.cache import TieredKVCache, create_tiered_cache
    from fade_core.cache.decode_loop import decode_loop
    from fade_core.cache.manual import (
        apply_tier_assignment,
        apply_tier_assignment_per_sequence,
        forward_with_tracking,
        reassign_tiers,
    )
    from fade_core.cache.rope_schemes import rope_scheme_of
    from fade_core.config import FadeConfig
    from fade_core.eviction.attention_tracker import AttentionTracker, Observation
    from fade_core.interfaces import (
        EvictionPolicy,
        Kernel,
        KernelConfig,
        LayerView,
        PolicyConfig,
        Quantizer,
        QuantizerConfig,
        QuantizerContext,
        RopeConfig,
        RopeScheme,
        TelemetrySinkConfig,
        Tier,
        TierConfig,
    )
    from fade_core.models.loading import load_model
    from fade_core.ops.buffers import MOST_TOKENS, AppendRule, StepBuffers
    from fade_core.ops.reference import AttentionOutput, FullSegment, PackedSegment, append, attention_mass
    from fade_core.plugins import list_plugins
    from fade_core.plugins.hookspecs import hookimpl
    from fade_core.plugins.resolve import AnyPolicy, get_policy, get_quantizer
    from fade_core.storage.tile_view import TileView
    from fade_core.support.sealed import FileHeader, FileKind

_HOME = {
    **dict.fromkeys(("TieredKVCache", "create_tiered_cache"), "cache"),
    **dict.fromkeys(("AnyPolicy", "get_policy", "get_quantizer"), "plugins.resolve"),
    "FadeConfig": "config",
    "decode_loop": "cache.decode_loop",
    "rope_scheme_of": "cache.rope_schemes",
    "TileView": "storage.tile_view",
    "hookimpl": "plugins.hookspecs",
    **dict.fromkeys(("FileHeader", "FileKind"), "support.sealed"),
    **dict.fromkeys(
        (
            "EvictionPolicy",
            "Kernel",
            "KernelConfig",
            "LayerView",
            "PolicyConfig",
            "Quantizer",
            "QuantizerConfig",
            "QuantizerContext",
            "RopeConfig",
            "RopeScheme",
            "TelemetrySinkConfig",
            "Tier",
            "TierConfig",
        ),
        "interfaces",
    ),
    **dict.fromkeys(("MOST_TOKENS", "AppendRule", "StepBuffers"), "ops.buffers"),
    **dict.fromkeys(("AttentionOutput", "FullSegment", "PackedSegment", "append", "attention_mass"), "ops.reference"),
    "load_model": "models.loading",
    **dict.fromkeys(
        (
            "apply_tier_assignment",
            "apply_tier_assignment_per_sequence",
            "forward_with_tracking",
            "reassign_tiers",
        ),
        "cache.manual",
    ),
    "list_plugins": "plugins",
    **dict.fromkeys(("JsonlExporter", "attach_telemetry"), "builtin.telemetry"),
    "AttentionTracker": "eviction.attention_tracker",
    "Observation": "eviction.attention_tracker",
}
"""Public name to the module that defines it."""

__all__ = [
    "MOST_TOKENS",
    "AnyPolicy",
    "AppendRule",
    "AttentionOutput",
    "AttentionTracker",
    "EvictionPolicy",
    "FadeConfig",
    "FileHeader",
    "FileKind",
    "FullSegment",
    "JsonlExporter",
    "Kernel",
    "KernelConfig",
    "LayerView",
    "Observation",
    "PackedSegment",
    "PolicyConfig",
    "Quantizer",
    "QuantizerConfig",
    "QuantizerContext",
    "RopeConfig",
    "RopeScheme",
    "StepBuffers",
    "TelemetrySinkConfig",
    "Tier",
    "TierConfig",
    "TieredKVCache",
    "TileView",
    "__version__",
    "append",
    "apply_tier_assignment",
    "apply_tier_assignment_per_sequence",
    "attach_telemetry",
    "attention_mass",
    "create_tiered_cache",
    "decode_loop",
    "forward_with_tracking",
    "get_policy",
    "get_quantizer",
    "hookimpl",
    "list_plugins",
    "load_model",
    "reassign_tiers",
    "rope_scheme_of",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
