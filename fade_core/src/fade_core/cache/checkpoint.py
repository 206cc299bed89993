"""Saving a cache and going on from it bit by bit: tensors in a sealed file, the rest as JSON in its header; no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from fade_core._version import __version__
from fade_core.cache.layer import TieredLayer
from fade_core.cache.layer_state import (
    DAMAGED,
    TieredFacts,
    load_quantizers,
    other_layer,
    other_state,
    tiered_facts,
    tiered_layer,
    tiered_state,
)
from fade_core.cache.passes import PassControl
from fade_core.config import FadeConfig
from fade_core.errors import CheckpointError, ConfigError, FadeError
from fade_core.models.geometry import kv_heads
from fade_core.packed import FORMAT_VERSION
from fade_core.support.sealed import FileHeader, FileKind
from fade_core.support.validation import Count, shown
from fade_core.support.writing import replacing

C = TypeVar("C", bound=PassControl)

_MARKED = 256
PLAUSIBLE = 2**16
"""Tokens that a file may always have room made for; more, as far as the model was made for them or the file holds some."""


class CacheHeader(FileHeader):
    """What a saved cache says of itself.

    Attributes:
        fade_core: version that wrote it.
        model: ``fingerprint`` of the model's configuration.
        weights: ``weights_fingerprint`` of the model.
        config: fields of the configuration, without telemetry: a file names nothing that loading it would write.
        max_cache_len: most tokens the cache may see.
        layers: what each layer says of itself, by index.
    """

    fade_core: Annotated[str, Field(max_length=64)]
    model: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    weights: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None
    config: dict[str, JsonValue]
    max_cache_len: Count | None
    layers: Annotated[dict[str, dict[str, JsonValue]], Field(max_length=10_000)]


CACHE_FILE = FileKind(
    "fade-kv-cache",
    FORMAT_VERSION,
    "a saved FADE cache",
    "save the cache again (cache.save, cache.cache_state_dict)",
    CacheHeader,
)


def fingerprint(model_config: Any) -> str:
    """A short hash of what decides a cache's shape: architecture, layers, heads, dimensions."""
    names = (
        "model_type",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_size",
        "head_dim",
        "vocab_size",
    )
    facts: dict[str, Any] = {}
    for name in names:
        try:
            facts[name] = getattr(model_config, name, None)
        except RuntimeError:  # transformers refuses: it differs between layers
            facts[name] = [getattr(layer, name, None) for layer in model_config.per_layer_config]
    return _hash(json.dumps(facts, sort_keys=True, default=str).encode())


def weights_fingerprint(model: Any) -> str | None:
    """A short hash of a few of the model's embeddings, or ``None`` where they cannot be read (offloaded, sharded).

    Another model of the same shape would read a cache without complaint, and answer nonsense.
    """
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if type(weight) is not torch.nn.Parameter or weight.device.type == "meta" or not weight.numel():
        return None
    flat = weight.detach().flatten()
    some = flat[:: max(1, flat.numel() // _MARKED)][:_MARKED]
    return _hash(some.float().cpu().numpy().tobytes())


def state_of(cache: PassControl) -> dict[str, Any]:
    """Header and tensors of a cache; tensors are clones.

    Raises:
        CheckpointError: if the model has layers whose state cannot be saved.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for index, layer in enumerate(cache.layers):
        facts, own = tiered_state(layer) if isinstance(layer, TieredLayer) else other_state(layer)
        layers[str(index)] = facts
        tensors.update({f"{index}.{name}": tensor for name, tensor in own.items()})
    header = {
        "kind": CACHE_FILE.name,
        "format": CACHE_FILE.format,
        "fade_core": __version__,
        "model": fingerprint(cache.model_config),
        "weights": cache.weights_fingerprint,
        "config": {name: value for name, value in cache.config.to_dict().items() if name != "telemetry"},
        "max_cache_len": cache.length_limit,
        "layers": layers,
    }
    copied = {n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    return {"header": header, "tensors": copied}


def restore(cache: PassControl, state: Mapping[str, Any]) -> None:
    """Fill ``cache`` from ``state_of``'s answer.

    Raises:
        CheckpointError: not a cache state, another format, model or configuration; the cache is unchanged then.
    """
    given: Any = state  # whatever it is
    header, tensors = (given.get(name) if isinstance(given, Mapping) else None for name in ("header", "tensors"))
    if not isinstance(header, Mapping) or not isinstance(tensors, Mapping):
        raise CheckpointError("this is not a saved FADE cache (cache_state_dict and save make them)")
    if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()):
        raise CheckpointError("the saved cache is damaged: its tensors are not tensors by name")
    _restore(cache, CACHE_FILE.checked(header, "this"), tensors)


def _restore(cache: PassControl, header: CacheHeader, tensors: Mapping[str, Tensor]) -> None:
    _check_model(header, fingerprint(cache.model_config), cache.weights_fingerprint)
    if compatible_fields(header.config) != compatible_fields(cache.config.to_dict()):
        raise CheckpointError(
            "the saved cache was made with another configuration; TieredKVCache.load restores both together"
        )
    held = _agreed(cache, header)
    if held is not None and cache.length_limit is not None and held.logical > cache.length_limit:
        raise CheckpointError(f"{held.logical} tokens were saved; this cache has max_cache_len={cache.length_limit}")
    parts: list[dict[str, Tensor]] = [{} for _ in cache.layers]
    for name, tensor in tensors.items():
        number, _, own = name.partition(".")
        if number not in header.layers or not own:
            raise CheckpointError(f"the saved cache is damaged: it holds a tensor {shown(name)}, which no layer has")
        parts[int(number)][own] = tensor
    fresh: list[Any] = []
    tiered: list[tuple[TieredLayer, dict[str, Tensor]]] = []
    for index, (layer, own_tensors) in enumerate(zip(cache.layers, parts, strict=True)):
        facts = header.layers[str(index)]
        try:
            if isinstance(layer, TieredLayer):
                heads = kv_heads(cache.model_config, index)
                tiered.append((tiered_layer(layer, tiered_facts(facts), own_tensors, heads), own_tensors))
                fresh.append(tiered[-1][0])
            else:
                fresh.append(other_layer(layer, facts, own_tensors, cache.device, held))
        except DAMAGED as error:
            raise CheckpointError(f"layer {index} of the saved cache is damaged: {error}") from error
    load_quantizers(tiered)
    cache.reset()
    for layer, found in zip(cache.layers, fresh, strict=True):
        vars(layer).update(vars(found))
    cache.start_passes()  # passes of these layers are this cache's
    for layer in cache.tiered:
        if layer.is_initialized:
            layer.steps.replan(fresh=bool(layer.plan.learners))
            layer.held.look_for_gaps()
            layer.changed()
        layer.settle()


def save(cache: PassControl, path: str | Path) -> None:
    """Write the cache to ``path`` (safetensors)."""
    state = state_of(cache)
    CACHE_FILE.write(path, state["header"], state["tensors"])


def load(
    path: str | Path, model: Any, kind: Callable[[Any, FadeConfig, int | None], C], max_cache_len: int | None
) -> C:
    """Read what ``save`` wrote into a new cache of a ``kind``. Raises ``CheckpointError`` for anything else."""
    header, tensors = CACHE_FILE.read(path, model.device)
    text = model.config.get_text_config(decoder=True)
    _check_model(header, fingerprint(text), weights_fingerprint(model))
    _check_plausible(header, text, max_cache_len)
    try:
        config = FadeConfig.model_validate({**header.config, "telemetry": ()})
        cache = kind(model, config, header.max_cache_len if max_cache_len is None else max_cache_len)
    except FadeError as error:
        raise CheckpointError(f"{path} was saved with a configuration that does not work here: {error}") from error
    try:
        _restore(cache, header, tensors)
    except BaseException:
        cache.detach()
        raise
    return cache


def dump_debug(cache: PassControl, path: str | Path) -> None:
    """Write lengths, tiers, bytes and configuration as JSON. Raises ``CheckpointError`` if it cannot be written."""
    report = cache.memory_report()
    layers = []
    for layer in cache.tiered:
        shown: dict[str, Any] = {"layer": layer.index, "logical_length": layer.logical}
        if layer.is_initialized:
            held = layer.held
            shown["window"] = held.window.lengths.tolist()
            shown["tiers"] = {store.tier.name: store.lengths.tolist() for store in held.stores}
            shown["padding"] = held.padding.tolist()
        layers.append(shown)
    snapshot = {
        "fade_core": __version__,
        "config": cache.config.to_dict(),
        "tier_names": cache.tier_names(),
        "kernels": {op: [list(r) for r in refused] for op, refused in cache.refusals.items()},
        "memory": report.to_dict(),
        "layers": layers,
    }
    with replacing(path, CheckpointError) as temporary:
        temporary.write_text(json.dumps(snapshot, indent=2), encoding="utf-8")


def _agreed(cache: PassControl, header: CacheHeader) -> TieredFacts | None:
    """What all tiered layers say alike: a pass is in all of them or in none. Raises ``CheckpointError`` if they differ."""
    if header.layers.keys() != {str(index) for index in range(len(cache.layers))}:
        raise CheckpointError(f"{len(header.layers)} layers were saved; this cache has {len(cache.layers)}")
    found: list[TieredFacts | None] = []
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, TieredLayer):
            try:
                found.append(tiered_facts(header.layers[str(index)]))
            except ConfigError as error:
                raise CheckpointError(f"layer {index} of the saved cache is damaged: {error}") from error
    alike = {one and (one.logical, len(one.since_ranking), one.dtype) for one in found}
    if len(alike) > 1:
        raise CheckpointError(
            "the saved cache is damaged: its layers hold different numbers of tokens or rows, or of different dtypes"
        )
    return found[0]


def _check_plausible(header: CacheHeader, text: Any, max_cache_len: int | None) -> None:
    """Refuse to make room for a number of tokens that only the file speaks of. Raises ``CheckpointError``."""
    seen = [logical for layer in header.layers.values() if isinstance(logical := layer.get("logical"), int)]
    most = max(PLAUSIBLE, int(getattr(text, "max_position_embeddings", 0) or 0), 2 * max(seen, default=0))
    if max_cache_len is None and header.max_cache_len is not None and header.max_cache_len > most:
        raise CheckpointError(
            f"the saved cache asks for room for {header.max_cache_len:,} tokens, more than the model was made for or the file "
            f"makes plausible ({most:,}); if that is meant, say so: TieredKVCache.load(path, model, max_cache_len=...)"
        )


def _check_model(header: CacheHeader, shape: str, weights: str | None) -> None:
    if header.model != shape:
        raise CheckpointError(
            "the saved cache belongs to a model of another shape; load it with the model that filled it"
        )
    if None not in (weights, header.weights) and header.weights != weights:
        raise CheckpointError(
            "the saved cache belongs to a model of this shape with other weights; load it with the model that filled it"
        )


def compatible_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a cache's contents: not which kernel reads them, nor who is told of events.

    A field that did not exist when the cache was saved has its default.
    """
    every = FadeConfig().to_dict() | dict(config)
    return {name: value for name, value in every.items() if name not in ("kernel", "telemetry")}


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
