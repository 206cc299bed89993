"""Which cache an evaluation runs: named, configured, or made by any function of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fade_core.config import FadeConfig
from fade_core.errors import ConfigError, UnknownComponentError
from fade_core.models.loading import exact_cache

CacheFactory = Callable[[Any], Any]
"""Makes a fresh, empty cache for a model."""

CacheLike = FadeConfig | Mapping[str, Any] | str | Path | CacheFactory | None
"""A configuration, its fields, a preset's name, "exact", a configuration file, a factory, or ``None`` (the default)."""

EXACT = "exact"


def factory_of(cache: CacheLike) -> CacheFactory:
    """A function that makes what ``cache`` describes.

    Raises:
        ConfigError: for a name that is neither a preset, "exact" nor a file, or a configuration that does not validate.
    """
    if callable(cache):
        return cache
    if cache == EXACT:
        return exact_cache
    return tiered_factory(configuration(cache))


def configuration(cache: FadeConfig | Mapping[str, Any] | str | Path | None) -> FadeConfig:
    """The ``FadeConfig`` that a preset's name, a file or a mapping means; ``None`` is the default.

    Raises:
        ConfigError: if it means none.
    """
    if cache is None:
        return FadeConfig()
    if isinstance(cache, FadeConfig):
        return cache
    if isinstance(cache, Mapping):
        return FadeConfig.model_validate(cache)
    path = Path(cache)
    if path.suffix or path.exists():
        return FadeConfig.from_file(path)
    try:
        return FadeConfig.preset(str(cache))
    except UnknownComponentError as error:
        raise ConfigError(f"{str(cache)!r} is neither a preset nor a configuration file: {error}") from error


def tiered_factory(config: FadeConfig) -> CacheFactory:
    """A function that makes a ``TieredKVCache`` of ``config``."""

    def build(model: Any) -> Any:
        from fade_core.cache.tiered_cache import create_tiered_cache

        return create_tiered_cache(model, config=config)

    return build


@contextmanager
def opened(factory: CacheFactory, model: Any) -> Iterator[Any]:
    """A fresh cache for the length of the block; the model gets its own attention back afterwards."""
    cache = factory(model)
    try:
        yield cache
    finally:
        detach = getattr(cache, "detach", None)
        if detach is not None:
            detach()
