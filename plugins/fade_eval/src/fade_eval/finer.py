"""Overrides that give a few layers more bits, as a part of a configuration file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from fade_core import FadeConfig
from fade_core.cache.named_caches import opened, tiered_factory
from fade_core.errors import ConfigError
from fade_core.interfaces import QuantizerConfig, QuantizerContext, Side
from fade_core.models.geometry import kv_heads
from fade_core.support.validation import Capacity

WIDEST = 8
"""Most bits that a finer layer is given."""

Overrides = dict[str, dict[str, Any]]
"""The table ``layers`` of a configuration: fields of an override by the key that names its layers."""


def finer_layers(model: Any, config: FadeConfig, layers: Iterable[int]) -> Overrides:
    """The overrides of ``config``, changed so that ``layers`` keep more.

    A layer with one rung gets about twice the bits for keys and for values: its own quantizers at another width, or
    ``uniform`` at 8 bits where they have none. In a layer with several rungs the finest takes everything.

    Args:
        model: a causal language model; its shapes decide which widths there are.
        config: what to refine. Slices among its overrides are split where only some of their layers change.
        layers: indices of the layers to refine. One that has no finer quantizers stays as it is.
    """
    with opened(tiered_factory(config), model) as cache:
        num_layers = len(cache.layers)
        head_dims = {layer.plan.index: layer.plan.ladder.tiers[0].keys.head_dim for layer in cache.tiered}
    finer = {}
    for layer in layers:
        own = config.for_layer(layer, num_layers)
        finer[layer] = _finer(own, _contexts(model, own, layer, num_layers, head_dims[layer]))
    return _merged(config, {layer: fields for layer, fields in finer.items() if fields}, num_layers)


def as_toml(overrides: Mapping[str, Mapping[str, Any]]) -> str:
    """The overrides as a configuration file has them, a line a field."""
    blocks = []
    for key, fields in overrides.items():
        blocks.append(
            "\n".join([f'[layers."{key}"]', *(f"{name} = {_inline(value)}" for name, value in fields.items())])
        )
    return "\n\n".join(blocks)


def _merged(config: FadeConfig, finer: Mapping[int, dict[str, Any]], num_layers: int) -> Overrides:
    written: Overrides = config.to_dict()["layers"]
    owners = config.overridden_layers(num_layers)
    changed = {owners[layer] for layer in finer if layer in owners}
    found = {key: fields for key, fields in written.items() if key not in changed}
    for layer in sorted({layer for layer, key in owners.items() if key in changed} | set(finer)):
        before = written[owners[layer]] if layer in owners else {}
        found[str(layer)] = {**before, **finer.get(layer, {})}
    return found


def _contexts(
    model: Any, config: FadeConfig, layer: int, num_layers: int, head_dim: int
) -> dict[Side, QuantizerContext]:
    text = model.config.get_text_config(decoder=True)
    heads = kv_heads(text, layer)
    sides: tuple[Side, Side] = ("key", "value")
    return {
        side: QuantizerContext(head_dim, side, config.tile, layer, num_layers, heads, model.device) for side in sides
    }


def _finer(config: FadeConfig, contexts: Mapping[Side, QuantizerContext]) -> dict[str, Any]:
    """Fields of the override that refines a layer; empty if nothing is finer."""
    rungs = config.resolved_ladder()
    if len(rungs) > 1:
        first = config.to_dict()["ladder"][0]
        return {"ladder": [{**first, "capacity": _together([rung.capacity for rung in rungs])}]}
    keys = _wider(rungs[0].keys, contexts["key"])
    values = _wider(rungs[0].values, contexts["value"])
    found = {name: quantizer for name, quantizer in (("keys", keys), ("values", values)) if quantizer}
    if found and config.ladder:  # its rung says what the width is
        return {"ladder": [{**config.to_dict()["ladder"][0], **found}]}
    return found


def _together(capacities: list[Capacity]) -> Capacity:
    """The capacity of one rung in place of several; "rest" where tokens and fractions cannot be added."""
    tokens = [capacity for capacity in capacities if isinstance(capacity, int)]
    shares = [capacity for capacity in capacities if isinstance(capacity, float)]
    if len(tokens) == len(capacities):
        return sum(tokens)
    return min(1.0, sum(shares)) if len(shares) == len(capacities) else "rest"


def _wider(quantizer: QuantizerConfig, context: QuantizerContext) -> dict[str, Any]:
    """The same quantizer at about twice its bits, or ``uniform`` at 8; empty if it has 8 already."""
    own: Any = quantizer.bits  # None for one that knows its width only when it is built
    now = quantizer.build(context).bits_per_element
    offered: list[tuple[float, QuantizerConfig]] = []
    for bits in range(2, WIDEST + 1):
        try:
            finer = quantizer.with_bits(bits)
            then = finer.build(context).bits_per_element
        except ConfigError:
            continue  # not a width of this quantizer
        if then > now:
            offered.append((then if own is None else bits, finer))
    width = now if own is None else own
    if offered:
        _, finer = min(offered, key=lambda each: (abs(each[0] - 2 * width), -each[0]))
        return finer.model_dump(mode="json", exclude_unset=True, exclude_none=True)
    if width >= WIDEST:
        return {}
    return {"kind": "uniform", "bits": WIDEST, "axis": "channel" if context.side == "key" else "token"}


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{name} = {_inline(item)}" for name, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_inline(item) for item in value) + "]"
    return json.dumps(value)  # strings, numbers and truth values look the same in TOML
