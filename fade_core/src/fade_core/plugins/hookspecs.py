"""Every door into FADE, on one screen. Hooks run once, when a registry loads: never once a token.

A plugin is a module on the entry-point group ``fade`` that implements any of these with ``@hookimpl``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer

    from fade_core.interfaces import (
        Kernel,
        PolicyConfig,
        Preset,
        QuantizerConfig,
        Recipe,
        RopeConfig,
        TelemetrySinkConfig,
        TierConfig,
    )

GROUP = "fade"
"""Name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def fade_tiers() -> Sequence[type[TierConfig]]:  # type: ignore[empty-body]
    """Tiers of the ladder, chosen by ``tier``."""


@hookspec
def fade_quantizers() -> Sequence[type[QuantizerConfig]]:  # type: ignore[empty-body]
    """Quantizers for keys and values, chosen by ``kind``."""


@hookspec
def fade_policies() -> Sequence[type[PolicyConfig]]:  # type: ignore[empty-body]
    """Policies that rank tokens for demotion and eviction, chosen by ``kind``."""


@hookspec
def fade_rope_schemes() -> Sequence[type[RopeConfig]]:  # type: ignore[empty-body]
    """RoPE schemes, chosen by ``kind`` or detected from the model's config."""


@hookspec
def fade_kernels() -> Sequence[Kernel | type[Kernel]]:  # type: ignore[empty-body]
    """Implementations of named ops, chosen by ``name``; a class is instantiated without arguments."""


@hookspec
def fade_telemetry_sinks() -> Sequence[type[TelemetrySinkConfig]]:  # type: ignore[empty-body]
    """Receivers of the cache's events, chosen by ``kind``."""


@hookspec
def fade_eval_tasks() -> Sequence[Any]:  # type: ignore[empty-body]
    """Tasks of ``fade eval``: objects or classes with a ``name``."""


@hookspec
def fade_quality_recipes(calibration: str | None) -> Sequence[Recipe]:  # type: ignore[empty-body]
    """Configurations that ``fade eval quality`` compares; ``calibration`` is the file that it was given, if any."""


@hookspec
def fade_presets() -> Sequence[Preset]:  # type: ignore[empty-body]
    """Named configurations, chosen by ``name``."""


@hookspec
def fade_commands(app: typer.Typer) -> None:
    """Add commands to the ``fade`` command line."""
