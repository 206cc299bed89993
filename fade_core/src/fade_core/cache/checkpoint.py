"""Saving a cache and going on from it bit by bit: tensors in safetensors, the rest as JSON in the header; no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fade_core._version import __version__
from fade_core.cache.layer import TieredLayer
from fade_core.cache.layer_state import load_quantizers, other_layer, other_state, tiered_layer, tiered_state
from fade_core.cache.passes import PassControl
from fade_core.config import FadeConfig
from fade_core.errors import CheckpointError, FadeError
from fade_core.packed import FORMAT_VERSION

C = TypeVar("C", bound=PassControl)

_KIND = "fade-kv-cache"
_MARKED = 256


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
        "kind": _KIND,
        "format": FORMAT_VERSION,
        "fade_core": __version__,
        "model": fingerprint(cache.model_config),
        "weights": cache.weights_fingerprint,
        "config": cache.config.to_dict(),
        "max_cache_len": cache.length_limit,
        "layers": layers,
    }
    return {"header": header, "tensors": {name: t.detach().clone().contiguous() for name, t in tensors.items()}}


def restore(cache: PassControl, state: Mapping[str, Any]) -> None:
    """Fill ``cache`` from ``state_of``'s answer.

    Raises:
        CheckpointError: not a cache state, another format, model or configuration; the cache is unchanged then.
    """
    header, tensors = _checked(state)
    _check_model(header, fingerprint(cache.model_config), cache.weights_fingerprint)
    if compatible_fields(header["config"]) != compatible_fields(cache.config.to_dict()):
        raise CheckpointError(
            "the saved cache was made with another configuration; TieredKVCache.load restores both together"
        )
    if len(header["layers"]) != len(cache.layers):
        raise CheckpointError(f"{len(header['layers'])} layers were saved; this cache has {len(cache.layers)}")
    fresh: list[Any] = []
    tiered: list[tuple[TieredLayer, dict[str, Tensor]]] = []
    for index, layer in enumerate(cache.layers):
        prefix = f"{index}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        try:
            facts = header["layers"][str(index)]
            if isinstance(layer, TieredLayer):
                tiered.append((tiered_layer(layer, facts, own), own))
                fresh.append(tiered[-1][0])
            else:
                fresh.append(other_layer(layer, facts, own, cache.device))
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"layer {index} of the saved cache is damaged: {error}") from error
    length = max(layer.logical for layer, _ in tiered)
    if cache.length_limit is not None and length > cache.length_limit:
        raise CheckpointError(f"{length} tokens were saved; this cache has max_cache_len={cache.length_limit}")
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
    save_file(state["tensors"] or {"empty": torch.zeros(1)}, str(path), metadata={"fade": json.dumps(state["header"])})


def load(path: str | Path, model: Any, kind: Callable[[Any, FadeConfig, int | None], C]) -> C:
    """Read what ``save`` wrote into a new cache of a ``kind``. Raises ``CheckpointError`` for anything else."""
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(str(path), "pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        if "fade" not in metadata:
            raise CheckpointError(f"{path} is a safetensors file, but not a saved FADE cache")
        state = {"header": json.loads(metadata["fade"]), "tensors": tensors}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file that FADE wrote, or is damaged: {error}") from error
    header, _ = _checked(state)
    _check_model(header, fingerprint(model.config.get_text_config(decoder=True)), weights_fingerprint(model))
    try:
        cache = kind(model, FadeConfig(**header["config"]), header["max_cache_len"])
    except FadeError as error:
        raise CheckpointError(f"{path} was saved with a configuration that does not work here: {error}") from error
    try:
        restore(cache, state)
    except CheckpointError:
        cache.detach()
        raise
    return cache


def dump_debug(cache: PassControl, path: str | Path) -> None:
    """Write lengths, tiers, bytes and configuration as JSON."""
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
    Path(path).write_text(json.dumps(snapshot, indent=2), encoding="utf-8")


def _checked(state: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    header = state.get("header") if isinstance(state, Mapping) else None
    if not isinstance(header, Mapping) or header.get("kind") != _KIND or "tensors" not in state:
        raise CheckpointError("this is not a saved FADE cache (cache_state_dict and save make them)")
    if header.get("format") != FORMAT_VERSION:
        raise CheckpointError(
            f"the cache was saved in format {header.get('format')} by fade-core {header.get('fade_core')}; "
            f"this is fade-core {__version__}, which reads format {FORMAT_VERSION}"
        )
    missing = [name for name in ("model", "weights", "config", "max_cache_len", "layers") if name not in header]
    if missing or not isinstance(header["layers"], Mapping) or not isinstance(header["config"], Mapping):
        raise CheckpointError(f"the header of the saved cache is damaged: {', '.join(missing) or 'layers'}")
    return dict(header), dict(state["tensors"])


def _check_model(header: Mapping[str, Any], shape: str, weights: str | None) -> None:
    if header["model"] != shape:
        raise CheckpointError(
            "the saved cache belongs to a model of another shape; load it with the model that filled it"
        )
    if None not in (weights, header["weights"]) and header["weights"] != weights:
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
