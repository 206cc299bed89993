"""What a model sees: the cache, a layer of it, handles, attention, rows that come and go, checkpoints, reports.

Names are imported on first use, so that a module of this room can be imported without all the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fade_core.cache.tiered_cache import TieredKVCache, create_tiered_cache

__all__ = ["TieredKVCache", "create_tiered_cache"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from fade_core.cache import tiered_cache

    return getattr(tiered_cache, name)
