"""Saving a cache and going on from it bit by bit: tensors in safetensors, the rest as JSON in the header; no pickle."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fade_core._version import __version__
from fade_core.config import FadeConfig
from fade_core.errors import CheckpointError, FadeError
from fade_core.layer import TieredLayer
from fade_core.packed import FORMAT_VERSION
from fade_core.window import Window

if TYPE_CHECKING:
    from fade_core.cache import TieredKVCache

_KIND = "fade-kv-cache"


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
    facts = {name: getattr(model_config, name, None) for name in names}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def state_of(cache: TieredKVCache) -> dict[str, Any]:
    """Header and tensors of a cache; tensors are clones."""
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, TieredLayer):
            layers[str(index)] = _layer_state(layer, f"{index}.", tensors)
        elif getattr(layer, "is_initialized", False):
            layers[str(index)] = _other_state(layer, f"{index}.", tensors)
    header = {
        "kind": _KIND,
        "format": FORMAT_VERSION,
        "fade_core": __version__,
        "model": fingerprint(cache.model_config),
        "config": cache.config.to_dict(),
        "max_cache_len": cache.length_limit,
        "layers": layers,
    }
    return {"header": header, "tensors": {name: t.detach().clone().contiguous() for name, t in tensors.items()}}


def restore(cache: TieredKVCache, state: Mapping[str, Any]) -> None:
    """Fill ``cache`` from ``state_of``'s answer.

    Raises:
        CheckpointError: not a cache state, another format, model or configuration; the cache is unchanged then.
    """
    header, tensors = _checked(state)
    if header["model"] != fingerprint(cache.model_config):
        raise CheckpointError(
            "the saved cache belongs to a model of another shape; load it with the model that filled it"
        )
    if header["config"] != cache.config.to_dict():
        raise CheckpointError(
            "the saved cache was made with another configuration; TieredKVCache.load restores both together"
        )
    staged = []
    for index, saved in header["layers"].items():
        layer = cache.layers[int(index)]
        try:
            staged.append(
                (layer, saved, {n[len(index) + 1 :]: t for n, t in tensors.items() if n.startswith(f"{index}.")})
            )
            if isinstance(layer, TieredLayer) and saved.get("initialized"):
                _check_layer(layer, saved, staged[-1][2])
        except (KeyError, RuntimeError) as error:
            raise CheckpointError(f"layer {index} of the saved cache is damaged: {error}") from error
    cache.reset()
    for layer, saved, own in staged:
        if isinstance(layer, TieredLayer):
            _fill(layer, saved, own)
        else:
            _fill_other(layer, saved, own)


def save(cache: TieredKVCache, path: str | Path) -> None:
    """Write the cache to ``path`` (safetensors)."""
    state = state_of(cache)
    save_file(state["tensors"] or {"empty": torch.zeros(1)}, str(path), metadata={"fade": json.dumps(state["header"])})


def load(path: str | Path, model: Any, kind: type[TieredKVCache]) -> TieredKVCache:
    """Read what ``save`` wrote. Raises ``CheckpointError`` for anything else."""
    if not Path(path).is_file():
        raise CheckpointError(f"there is no file {path}")
    try:
        with safe_open(str(path), "pt", device=str(model.device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from error
    if "fade" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but not a saved FADE cache")
    state = {"header": json.loads(metadata["fade"]), "tensors": tensors}
    header, _ = _checked(state)
    try:
        config = FadeConfig(**header["config"])
    except FadeError as error:
        raise CheckpointError(f"{path} needs components that are not installed here: {error}") from error
    cache = kind(model, config, header["max_cache_len"])
    try:
        restore(cache, state)
    except CheckpointError:
        cache.detach()
        raise
    return cache


def dump_debug(cache: TieredKVCache, path: str | Path) -> None:
    """Write lengths, tiers, bytes and configuration as JSON."""
    report = cache.memory_report()
    layers = []
    for layer in cache.tiered:
        shown: dict[str, Any] = {"layer": layer.index, "logical_length": layer.logical}
        if layer.window is not None:
            shown["window"] = layer.window.lengths.tolist()
            shown["tiers"] = {store.tier.name: store.lengths.tolist() for store in layer.stores}
            shown["padding"] = layer.padding.tolist()
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
    if header["format"] != FORMAT_VERSION:
        raise CheckpointError(
            f"the cache was saved in packed format {header['format']} by fade-core {header['fade_core']}; "
            f"this is fade-core {__version__} with format {FORMAT_VERSION}"
        )
    return dict(header), dict(state["tensors"])


def _layer_state(layer: TieredLayer, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if layer.window is None:
        return {"initialized": False}
    tensors.update({f"{prefix}window.{n}": t for n, t in layer.window.state().items()})
    tensors[f"{prefix}padding"] = layer.padding
    for i, store in enumerate(layer.stores):
        tensors.update({f"{prefix}store{i}.{n}": t for n, t in store.state().items()})
        for side, quantizer in (("k", store.tier.keys), ("v", store.tier.values)):
            tensors.update({f"{prefix}store{i}.quantizer.{side}.{n}": t for n, t in quantizer.state_dict().items()})
    return {
        "initialized": True,
        "logical": layer.logical,
        "since_ranking": layer.since_ranking,
        "dtype": str(layer.dtype).removeprefix("torch."),
        "explicit": [store.explicit for store in layer.stores],
    }


def _check_layer(layer: TieredLayer, saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    names = {"window.keys", "window.values", "window.positions", "window.lengths", "padding"}
    names |= {f"store{i}.table" for i in range(len(layer.plan.ladder.tiers))}
    missing = sorted(names - own.keys())
    if missing or not isinstance(getattr(torch, saved["dtype"], None), torch.dtype):
        raise CheckpointError(f"layer {layer.index} of the saved cache lacks {missing or 'a dtype'}")


def _fill(layer: TieredLayer, saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    if not saved["initialized"]:
        return
    keys, values = own["window.keys"], own["window.values"]
    layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    cast(Window, layer.window).load({n[7:]: t for n, t in own.items() if n.startswith("window.")})
    layer.padding = own["padding"].cpu().clone()
    layer.logical, layer.since_ranking = saved["logical"], saved["since_ranking"]
    for i, store in enumerate(layer.stores):
        store.explicit = saved["explicit"][i]
        store.load({n[len(f"store{i}.") :]: t for n, t in own.items() if n.startswith(f"store{i}.")})
        for side, quantizer in (("k", store.tier.keys), ("v", store.tier.values)):
            prefix = f"store{i}.quantizer.{side}."
            quantizer.load_state_dict({n[len(prefix) :]: t for n, t in own.items() if n.startswith(prefix)})


def _other_state(layer: Any, prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, (bool, int, float, str)) or value is None:
            plain[name] = value
        elif isinstance(value, (torch.dtype, torch.device)):
            continue
        else:
            raise CheckpointError(
                f"{type(layer).__name__} keeps {name} as {type(value).__name__}, which FADE cannot save; "
                "caches of models with such layers cannot be saved yet"
            )
    return {"plain": plain, "class": type(layer).__name__}


def _fill_other(layer: Any, saved: Mapping[str, Any], own: Mapping[str, Tensor]) -> None:
    for name, value in saved["plain"].items():
        setattr(layer, name, value)
    for name, tensor in own.items():
        setattr(layer, name, tensor.clone())
    if layer.keys is not None:
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
