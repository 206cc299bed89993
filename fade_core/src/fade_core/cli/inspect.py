"""``fade inspect``: what a configuration means on a model, or what a saved cache holds."""

from __future__ import annotations

import json as json_format
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fade_core.cli.console import out, print_json, rows, size, table, working
from fade_core.cli.options import Cache, Json, Model
from fade_core.errors import CheckpointError, InputError
from fade_core.models.geometry import head_channels, kv_heads

if TYPE_CHECKING:
    from fade_core.cache.layer import TieredLayer


@dataclass(frozen=True)
class Predicted:
    """Bytes of one row of a given length, all layers together; positions and statistics of a policy come on top.

    Attributes:
        tokens: length.
        window: sinks and window, in the model's dtype.
        tiers: packed bytes of each tier.
        evicted: tokens and heads that are dropped.
        exact: bytes of transformers' own cache.
    """

    tokens: int
    window: int
    tiers: dict[str, int]
    evicted: int
    exact: int

    @property
    def total(self) -> int:
        """Window and tiers."""
        return self.window + sum(self.tiers.values())


def inspect(
    snapshot: Annotated[
        Path | None,
        typer.Argument(help="A saved cache (.safetensors) or a debug dump (.json); else the options count."),
    ] = None,
    model: Model = "smollm2",
    config: Cache = "safe",
    tokens: Annotated[list[int], typer.Option(min=1, help="Lengths to predict bytes for.")] = [2048, 8192, 32768],  # noqa: B006
    json: Json = False,
) -> None:
    """Show geometry, tiers, bits and predicted bytes of a configuration on a model; no weights are loaded."""
    if snapshot is not None:
        _show_snapshot(read_snapshot(snapshot), json)
        return
    from fade_core.cache import create_tiered_cache
    from fade_core.cache.named_caches import configuration
    from fade_core.models.loading import load_skeleton

    wanted = configuration(config)
    with working(f"reading the config of {model}"):
        skeleton = load_skeleton(model)
        cache = create_tiered_cache(skeleton, wanted)
    plan = _plan(cache, skeleton)
    found = [predict(cache.tiered, length, skeleton) for length in tokens]
    cache.detach()
    if json:
        print_json({**plan, "predicted": [{**asdict(p), "total": p.total, "ratio": p.total / p.exact} for p in found]})
        return
    geometry = [(name.replace("_", " "), value) for name, value in plan.items() if not isinstance(value, list)]
    out.print(rows(table(f"{config} on {model}", "model", ""), geometry))
    columns = ("layers", "tier", "capacity", "keys", ">bits", "values", ">bits")
    out.print(rows(table("tiers, finest first", *columns), [tuple(tier.values()) for tier in plan["tiers"]]))
    lines = [
        (
            f"{p.tokens:,}",
            size(p.exact),
            size(p.window),
            " ".join(f"{name} {size(held)}" for name, held in p.tiers.items()),
            size(p.total),
            f"{p.total / p.exact:.3f}x",
        )
        for p in found
    ]
    headings = (">tokens", f">exact ({plan['dtype']})", ">window", "packed", ">in all", ">to exact")
    out.print(rows(table("predicted bytes of one row", *headings), lines))


def predict(layers: list[TieredLayer], tokens: int, model: Any) -> Predicted:
    """Bytes that ``tokens`` tokens of one row will take in these layers."""
    import torch

    length = torch.tensor([tokens])
    window = evicted = exact = 0
    tiers: dict[str, int] = {}
    for layer in layers:
        ladder = layer.plan.ladder
        heads, key_dim, value_dim = _geometry(layer, model)
        itemsize = (key_dim + value_dim) * heads * model.dtype.itemsize
        packed = max(0, tokens - ladder.n_sink - ladder.recent_window) // ladder.tile * ladder.tile
        due = torch.tensor([packed if ladder.tiers else 0])
        kept = length - due
        takes = ladder.fill(due, length, kept)
        slots = tokens - packed if ladder.tiers else tokens
        window += slots * itemsize
        exact += tokens * itemsize
        evicted += int(due - sum(takes)) * heads
        for tier, take in zip(ladder.tiers, takes, strict=True):
            tiles = -(-int(take) // ladder.tile) * heads
            held = sum(_tile_bytes(quantizer) for quantizer in (tier.keys, tier.values))
            tiers[tier.name] = tiers.get(tier.name, 0) + tiles * held
    return Predicted(tokens, window, tiers, evicted, exact)


def read_snapshot(path: Path) -> dict[str, Any]:
    """What a saved cache or a debug dump says about itself.

    Raises:
        CheckpointError: if the file is neither.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    if path.suffix == ".json":
        try:
            found = json_format.loads(path.read_text(encoding="utf-8"))
        except (OSError, RecursionError, ValueError) as error:
            raise CheckpointError(f"{path}: not a debug dump, which is JSON: {error}") from error
        try:
            return {
                "file": str(path),
                "fade_core": found["fade_core"],
                "tokens": found["memory"]["tokens"],
                "layers": len(found["layers"]),
                "bytes": found["memory"]["total"],
                "parts": dict(found["memory"]["tiers"]),
                "config": dict(found["config"]),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: JSON, but not what cache.dump_debug() writes ({error!r})") from error
    return _read_saved(path)


def _read_saved(path: Path) -> dict[str, Any]:
    from fade_core.cache.checkpoint import CACHE_FILE

    header, tensors = CACHE_FILE.read(path)
    parts: dict[str, int] = {}
    for name, tensor in tensors.items():
        part = name.split(".")[1] if "." in name else name
        parts[part] = parts.get(part, 0) + tensor.numel() * tensor.element_size()
    lengths = [logical for layer in header.layers.values() if isinstance(logical := layer.get("logical", 0), int)]
    return {
        "file": str(path),
        "fade_core": header.fade_core,
        "format": CACHE_FILE.format,
        "model": header.model,
        "tokens": max(lengths, default=0),
        "layers": len(header.layers),
        "bytes": sum(parts.values()),
        "parts": parts,
        "config": header.config,
    }


def _show_snapshot(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    plain = [(name, value) for name, value in found.items() if name not in ("parts", "config", "bytes")]
    plain.append(("bytes", size(found["bytes"])))
    plain += [(f"  {name}", size(held)) for name, held in found["parts"].items()]
    out.print(rows(table("saved cache", "what", ""), plain))
    from fade_core.config.files import render_table

    out.out(render_table(found["config"], "yaml"), highlight=False, end="")


def _plan(cache: Any, model: Any) -> dict[str, Any]:
    tiered = cache.tiered
    if not tiered:
        raise InputError("this model has no layer that FADE compresses")
    heads, key_dim, _ = _geometry(tiered[0], model)
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "layers": len(cache.layers),
        "compressed_layers": len(tiered),
        "kv_heads": heads,
        "head_dim": key_dim,
        "attention": cache.attention,
        "sinks": tiered[0].plan.ladder.n_sink,
        "window": tiered[0].plan.ladder.recent_window,
        "policy": cache.config.policy.kind,
        "budget": "none" if cache.config.policy.budget is None else str(cache.config.policy.budget),
        "tiers": _tiers(tiered),
    }


def _tiers(layers: list[TieredLayer]) -> list[dict[str, Any]]:
    """Every distinct ladder once, with the layers that have it."""
    ladders: dict[tuple[tuple[object, ...], ...], list[int]] = {}
    for layer in layers:
        described = tuple(
            (tier.name, tier.capacity, tier.keys.kind, tier.keys.bits_per_element)
            + (tier.values.kind, tier.values.bits_per_element)
            for tier in layer.plan.ladder.tiers
        )
        ladders.setdefault(described, []).append(layer.index)
    columns = ("tier", "capacity", "keys", "key_bits", "values", "value_bits")
    return [
        {"layers": _ranges(indices), **dict(zip(columns, rung, strict=True))}
        for rungs, indices in ladders.items()
        for rung in rungs
    ]


def _ranges(indices: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _geometry(layer: TieredLayer, model: Any) -> tuple[int, int, int]:
    """KV heads, key channels and value channels of a layer."""
    text = model.config.get_text_config(decoder=True)
    heads, dim = kv_heads(text, layer.index), head_channels(text, layer.index)
    tiers = layer.plan.ladder.tiers
    return (heads, tiers[0].keys.head_dim, tiers[0].values.head_dim) if tiers else (heads, dim, dim)


def _tile_bytes(quantizer: Any) -> int:
    """Bytes of a packed tile of one head."""
    return sum(dtype.itemsize * math.prod(shape) for shape, dtype in quantizer.field_shapes().values())
