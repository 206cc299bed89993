"""What FADE finds on the entry-point group ``fade``."""

from __future__ import annotations

from fade_core import hookimpl
from fade_core.interfaces import RopeConfig
from fade_rope import configs


@hookimpl
def fade_rope_schemes() -> list[type[RopeConfig]]:
    """All schemes of this plugin."""
    return [
        configs.AutoRopeConfig,
        configs.NoRopeConfig,
        configs.DefaultRopeConfig,
        configs.LinearRopeConfig,
        configs.NtkRopeConfig,
        configs.DynamicRopeConfig,
        configs.YarnRopeConfig,
        configs.Llama3RopeConfig,
        configs.LongRopeConfig,
        configs.ProportionalRopeConfig,
        configs.MRopeConfig,
    ]
