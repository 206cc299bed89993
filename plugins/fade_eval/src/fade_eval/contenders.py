"""What ``fade eval quality`` compares: installed recipes, one's own configurations, transformers' own compressed caches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from torch import Tensor

from fade_core import FadeConfig
from fade_core.cache.named_caches import CacheFactory, CacheLike, factory_of, opened, tiered_factory
from fade_core.errors import ConfigError, FadeError
from fade_core.models.loading import quantized_cache
from fade_core.plugins import default_registry
from fade_core.support.validation import did_you_mean
from fade_eval.decode import feed, prefill

Source = Literal["recipe", "configuration", "peer"]

PEERS: tuple[tuple[str, int | None], ...] = (("quanto", 4), ("quanto", 2), ("hqq", 4), ("hqq", 2), ("fp8", None))
"""Backends and widths of transformers' QuantizedCache; what is not installed is left out with the reason."""


@dataclass(frozen=True)
class Contender:
    """One cache in the comparison.

    Attributes:
        name: what tables and plots call it.
        factory: makes it for a model.
        source: where it comes from; only what somebody configured must work on every model.
        note: a few words on what it is.
    """

    name: str
    factory: CacheFactory
    source: Source = "configuration"
    note: str = ""


def contenders(
    configurations: Mapping[str, CacheLike] | None = None,
    *,
    n_sink: int = 4,
    window: int = 64,
    calibration: str | None = None,
    only: Sequence[str] = (),
) -> list[Contender]:
    """Every recipe that is installed, then ``configurations``, then the peers.

    Args:
        configurations: one's own, by name; sinks and window are theirs.
        n_sink: sink tokens of the recipes.
        window: newest tokens that recipes and peers keep in full precision.
        calibration: file for the recipes that need one.
        only: take those whose name contains one of these (case ignored), and ``configurations``; empty for all.

    Raises:
        ConfigError: if a name of ``only`` fits nothing, two have one name, or nothing makes use of ``calibration``.
        PluginError: if two plugins bring recipes of one name.
    """
    registry = default_registry()
    recipes = registry.quality_recipes(calibration)
    if calibration and len(recipes) == len(registry.quality_recipes()):
        raise ConfigError(
            f"calibration {calibration!r}: nothing installed makes a recipe of it; pip install fade-quant-rotated does"
        )
    offered = [
        Contender(
            recipe.name, _built({"n_sink": n_sink, "recent_window": window, **recipe.fields}), "recipe", recipe.note
        )
        for recipe in recipes
    ]
    others = peers(window)
    own = [Contender(name, factory_of(cache)) for name, cache in (configurations or {}).items()]
    taken = {contender.name for contender in (*offered, *others)}
    for contender in own:
        if contender.name in taken:
            raise ConfigError(f"configuration {contender.name!r} has the name of a recipe; give it another")
    return [*_named(offered, others, only), *own]


def peers(window: int) -> list[Contender]:
    """transformers' QuantizedCache with every backend and width, ``window`` newest tokens in full precision."""
    return [_peer(backend, bits, window) for backend, bits in PEERS]


def _built(fields: dict[str, Any]) -> CacheFactory:
    """Validated when it is called: a recipe that does not validate fails alone."""

    def build(model: Any) -> Any:
        return tiered_factory(FadeConfig(**fields))(model)

    return build


def _peer(backend: str, bits: int | None, window: int) -> Contender:
    name = f"QuantizedCache {backend}" + ("" if bits is None else f" int{bits}")
    factory = partial(quantized_cache, backend=backend, bits=bits, residual=window)
    return Contender(name, factory, "peer", "transformers")


def _named(offered: Iterable[Contender], others: Iterable[Contender], only: Sequence[str]) -> list[Contender]:
    everything = [*offered, *others]
    for wanted in only:
        if not any(wanted.lower() in contender.name.lower() for contender in everything):
            names = [contender.name for contender in everything]
            raise ConfigError(f"no recipe has {wanted!r} in its name{did_you_mean(wanted, names)}: {', '.join(names)}")
    if not only:
        return everything
    return [c for c in everything if any(wanted.lower() in c.name.lower() for wanted in only)]


def refusal(contender: Contender, model: Any, ids: Tensor) -> str:
    """Why a contender cannot run on ``model``, tried on token ids ``[B, T >= 3]``; "" if it can. Raises as ``excuse``."""
    try:
        with opened(contender.factory, model) as cache:
            prefill(model, ids[:, :-2], cache)
            for _ in feed(model, ids[:, -2:], cache):
                pass
    except Exception as error:  # noqa: BLE001 (excuse raises what may not be left out)
        return excuse(contender, error)
    return ""


def excuse(contender: Contender, error: Exception) -> str:
    """The reason to leave a contender out: a recipe that does not fit this model, or whatever a peer raises.

    Raises:
        Exception: ``error`` again, if it is a mistake in FADE or in a plugin, or comes from one's own configuration.
    """
    if contender.source == "peer":
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    if contender.source == "recipe" and isinstance(error, FadeError):
        return str(error)
    raise error
