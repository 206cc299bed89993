"""What one layer of a cache is, as tensors and plain numbers: taken out, and put into a fresh layer after checks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fade_core.cache.layer import TieredLayer
from fade_core.errors import CheckpointError, InputError
from fade_core.interfaces import Quantizer
from fade_core.storage.pool import numbered
from fade_core.storage.slots import under
from fade_core.storage.tier_store import TierStore
from fade_core.storage.window import Window
from fade_core.support.transfer import sent

Tensors = dict[str, Tensor]
Facts = dict[str, Any]


# --- tiered layers ---


def tiered_state(layer: TieredLayer) -> tuple[Facts, Tensors]:
    """Numbers and tensors from which ``tiered_layer`` makes an equal layer."""
    if not layer.is_initialized:
        return {"initialized": False}, {}
    held = layer.held
    tensors = {f"window.{n}": t for n, t in held.window.state().items()} | {"padding": held.padding}
    if held.queries is not None:
        tensors |= {f"queries.{n}": t for n, t in held.queries.tensors().items()}
    for i, store in enumerate(held.stores):
        tensors |= {f"store{i}.{n}": t for n, t in store_state(store).items()}
        for side, quantizer in _sides(store):
            tensors |= {f"quantizer{i}.{side}.{n}": t for n, t in quantizer.state_dict().items()}
    facts = {
        "initialized": True,
        "logical": held.logical,
        "since_ranking": (held.logical - held.ranked_at).tolist(),
        "dtype": _name(layer.dtype),
        "explicit": [store.table.stores_positions for store in held.stores],
    }
    return facts, tensors


def tiered_layer(like: TieredLayer, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> TieredLayer:
    """A layer of ``like``'s plan with a saved state, its quantizers left alone.

    Raises:
        CheckpointError: for a state that no such layer can have.
    """
    layer = TieredLayer(like.plan, like.max_length)
    layer.steps.compiles, layer.steps.checks_masks = like.steps.compiles, like.steps.checks_masks
    if not facts["initialized"]:
        return layer
    dtype = getattr(torch, facts["dtype"])
    window = under(tensors, "window.")
    keys, values = window["keys"], window["values"]
    _check(keys.dim() == values.dim() == 4 and keys.dtype == values.dtype == dtype, "keys and values of the window")
    try:
        layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    except InputError as error:
        raise CheckpointError(str(error)) from error
    held, batch = layer.held, keys.shape[0]
    held.logical = int(facts["logical"])
    held.ranked_at = held.logical - torch.tensor(facts["since_ranking"], dtype=torch.long)
    held.padding = tensors["padding"].cpu().clone()
    _check(held.padding.shape == (batch,) and _within(held.padding, 0, held.logical), "padding")
    _check(held.ranked_at.shape == (batch,), "steps since the last ranking")
    _check_window(held.window, window, held.logical)
    tokens = {name: window[name] for name in held.window.slots.tensors if name != "shift"}
    held.window.assign(tokens | {"positions": window["positions"][:, None]}, window["lengths"].cpu())
    if held.queries is not None:
        _check_queries(under(tensors, "queries."), batch, keys.shape[3])
        held.queries.load(under(tensors, "queries."), keys.device)
    _check(len(facts["explicit"]) == len(held.stores), "number of tiers")
    for i, (store, explicit) in enumerate(zip(held.stores, facts["explicit"], strict=True)):
        own = under(tensors, f"store{i}.")
        if explicit:
            store.table.store_positions()
        _check_store(store, own, held.logical)
        load_store(store, own)
    stored = held.window.lengths[:, None] + sum(s.lengths for s in held.stores)
    _check(bool((stored <= held.lengths[:, None]).all()), "number of tokens")
    return layer


def store_state(store: TierStore) -> Tensors:
    """Tensors from which ``load_store`` fills an equal store: live tiles, renumbered, and the table."""
    table, ids, tiles = store.table, store.table.live_ids(), store.tiles
    live, counts = ids >= 0, table.live_counts()
    used, place = numbered(ids[live])
    starts = torch.zeros_like(ids) if table.starts is None else table.starts[:, :, :tiles].long().cpu() * live
    state = {f"pool.{name}": field for name, field in store.pool.read(used).items()}
    state |= {"table": torch.full_like(ids, -1).masked_scatter(live, place), "counts": counts, "starts": starts}
    state["offsets"] = torch.empty((*ids.shape[:2], 0, store.tile), dtype=torch.int32, device=store.device)
    slack = sent(torch.arange(store.tile) >= counts[..., None], store.device)  # [B, H_kv, tiles, tile]
    for name, note in table.slots.tensors.items():
        if name == "positions":
            state["offsets"] = note[:, :, :tiles].masked_fill(slack, -1)
        elif name not in ("starts", "shift"):
            state[name] = note[:, :, :tiles].masked_fill(slack, 0)
    return state


def load_store(store: TierStore, state: Mapping[str, Tensor]) -> None:
    """Take over what ``store_state`` gave, into an empty store; positions are kept as they are there."""
    table, saved, counts, starts = store.table, *(state[name].cpu() for name in ("table", "counts", "starts"))
    offsets = state["offsets"] if state["offsets"].shape[2] else starts[..., None] + torch.arange(store.tile)
    if state["offsets"].shape[2]:
        table.store_positions()
    live, width = saved >= 0, saved.shape[2]
    fields = {name: state[f"pool.{name}"] for name in store.pool.fields}
    table.resize(max(width, table.width))
    table.use(live.sum(-1))
    used, place = numbered(saved[live])
    table.shared = len(used) < len(place)
    laid = table.in_runs()[:, :, :width][live]
    tiles = {name: field.index_select(0, used.to(field.device)) for name, field in fields.items()}
    ids = store.pool.write(tiles, torch.empty(0), laid if len(laid) == len(used) else None)
    table.ids.host[:, :, :width][live] = ids[place].int()
    table.counts.host[:, :, :width][live] = counts[live].int()
    given = {**state, "starts": starts, "positions": offsets}
    for name, held in table.slots.tensors.items():
        if name != "shift":
            held[:, :, :width] = given[name].to(held.device, held.dtype)
    store.heads_aligned = table.starts is not None and bool(
        (starts == starts[:, :1]).all() & (counts == counts[:, :1]).all()
    )
    store.release()


def load_quantizers(layers: Iterable[tuple[TieredLayer, Mapping[str, Tensor]]]) -> None:
    """Give the quantizers of the layers' plans what they need to decode.

    Raises:
        CheckpointError: if something does not fit; no quantizer has changed then.
    """
    done: list[tuple[Quantizer, Tensors]] = []
    try:
        for layer, tensors in layers:
            for i, store in enumerate(layer.held.stores if layer.is_initialized else ()):
                for side, quantizer in _sides(store):
                    done.append((quantizer, dict(quantizer.state_dict())))
                    quantizer.load_state_dict(under(tensors, f"quantizer{i}.{side}."))
    except CheckpointError:
        for quantizer, before in done:
            quantizer.load_state_dict(before)
        raise


def _sides(store: TierStore) -> tuple[tuple[str, Quantizer], tuple[str, Quantizer]]:
    return ("k", store.tier.keys), ("v", store.tier.values)


def _check_window(window: Window, state: Mapping[str, Tensor], logical: int) -> None:
    batch, heads, slots, _ = state["keys"].shape
    _check(state["values"].shape[:3] == (batch, heads, slots), "values of the window")
    positions, lengths = state["positions"], state["lengths"]
    _check(positions.shape == (batch, slots) and lengths.shape == (batch,), "positions of the window")
    _check(_within(lengths, 0, slots), "lengths of the window")
    live = torch.arange(slots) < lengths.cpu()[:, None]
    _check(_within(positions.cpu()[live], 0, logical - 1), "positions of the window")
    for name in window.statistics:
        _check(state[f"statistic.{name}"].shape == (batch, heads, slots), f"statistic {name} of the window")


def _check_store(store: TierStore, state: Mapping[str, Tensor], logical: int) -> None:
    what = f"tier {store.tier.name}"
    batch, heads = store.table.used.host.shape
    table, counts, starts = (state[name].cpu() for name in ("table", "counts", "starts"))
    shape = table.shape
    _check(
        table.dim() == 3 and shape[:2] == (batch, heads) and counts.shape == starts.shape == shape, f"table of {what}"
    )
    capacity = next(iter(under(state, "pool.").values())).shape[0]
    for name, field in store.pool.fields.items():
        saved = state[f"pool.{name}"]
        _check(saved.dtype == field.dtype and saved.shape == (capacity, *field.shape[1:]), f"field {name} of {what}")
    _check(_within(table, -1, capacity - 1) and _within(counts, 0, store.tile), f"table of {what}")
    _check(torch.equal(table >= 0, store.table.present(counts > 0)), f"table of {what}")
    if store.table.stores_positions:
        offsets = state["offsets"].cpu()
        _check(offsets.shape == (*shape, store.tile), f"positions of {what}")
        live = torch.arange(store.tile) < counts[..., None]
        _check(_within(offsets[live], 0, logical - 1), f"positions of {what}")
    else:
        _check(_within(starts[counts > 0], 0, logical - 1), f"positions of {what}")
    for name in store.statistics:
        _check(state[f"statistic.{name}"].shape == (*shape, store.tile), f"statistic {name} of {what}")


def _check_queries(state: Mapping[str, Tensor], batch: int, dim: int) -> None:
    heads = state["mean"].shape[1] if state and state["mean"].dim() == 3 else 0
    shapes = {"weight": (batch,), "mean": (batch, heads, dim), "scatter": (batch, heads, dim, dim)}
    _check(all(t.shape == shapes.get(name) for name, t in state.items()), "statistics of the queries")


def _within(numbers: Tensor, low: int, high: int) -> bool:
    return not numbers.is_floating_point() and bool(((numbers >= low) & (numbers <= high)).all())


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise CheckpointError(f"the {what} cannot be right")


# --- layers of transformers' own ---


def other_state(layer: Any) -> tuple[Facts, Tensors]:
    """Attributes of a layer that FADE does not compress: a sliding window, the states of linear attention.

    Raises:
        CheckpointError: if it keeps something that is neither a tensor nor a plain value.
    """
    tensors: Tensors = {}
    facts = {name: _written(value, f"{type(layer).__name__}.{name}", tensors) for name, value in vars(layer).items()}
    return {"class": type(layer).__name__, "attributes": facts}, tensors


def other_layer(like: Any, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    """A copy of ``like`` with saved attributes. Raises ``CheckpointError`` if it is a layer of another class."""
    if facts["class"] != type(like).__name__:
        raise CheckpointError(f"a {facts['class']} was saved where the model has a {type(like).__name__}")
    layer = copy.copy(like)
    for name, written in facts["attributes"].items():
        setattr(layer, name, _read(written, tensors, device))
    return layer


def _written(value: Any, name: str, tensors: Tensors) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, torch.dtype):
        return {"dtype": _name(value)}
    if isinstance(value, torch.device):
        return {"device": True}  # wherever the cache is loaded
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        return {"by_index": {str(key): _written(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    raise CheckpointError(f"{name} is a {type(value).__name__}, which FADE cannot save")


def _read(written: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> Any:
    ((kind, value),) = written.items()
    if kind == "value":
        return value
    if kind == "tensor":
        return tensors[value].to(device).clone()
    if kind == "dtype":
        return getattr(torch, value)
    if kind == "device":
        return device
    if kind == "by_index":
        return {int(key): _read(item, tensors, device) for key, item in value.items()}
    raise CheckpointError(f"an attribute is written as {kind!r}, which this version does not know")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
