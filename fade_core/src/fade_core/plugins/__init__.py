"""Who provides what: every hook on one screen (``hookspecs``), and the registry of what is installed.

Names are imported on first use: a plugin's module that imports ``hookimpl`` imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fade_core.plugins.record import PluginInfo
    from fade_core.plugins.registry import GROUPS, Group, Registry, default_registry, list_plugins, use_registry

__all__ = ["GROUPS", "Group", "PluginInfo", "Registry", "default_registry", "list_plugins", "use_registry"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fade_core.plugins import registry

    return getattr(registry, name)
