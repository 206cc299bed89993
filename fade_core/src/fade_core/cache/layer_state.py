"""What one layer of a cache is, as tensors and plain numbers: taken out, and put into a fresh layer after checks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import JsonValue, StrictBool
from torch import Tensor
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from fade_core.cache.layer import TieredLayer
from fade_core.errors import CheckpointError, InputError
from fade_core.eviction.contents import LayerContents
from fade_core.interfaces import Quantizer
from fade_core.storage.pool import numbered
from fade_core.storage.slots import under
from fade_core.storage.tier_store import TierStore
from fade_core.storage.window import Window
from fade_core.support.sealed import FileHeader
from fade_core.support.transfer import sent
from fade_core.support.validation import LARGEST, Count, WholeNumber, shown

DAMAGED = (ArithmeticError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""What reading a state that cannot be right raises; FADE's own errors are ``ValueError``s."""

Tensors = dict[str, Tensor]
Facts = dict[str, Any]


# --- tiered layers ---


class TieredFacts(FileHeader):
    """What a header says of a tiered layer that holds tokens.

    Attributes:
        initialized: that it does.
        logical: tokens the model has seen.
        since_ranking: tokens since each row was ranked.
        dtype: of keys and values in full precision.
        explicit: of each tier, whether it keeps a position for every token.
    """

    initialized: Literal[True]
    logical: Count
    since_ranking: tuple[WholeNumber, ...]
    dtype: Literal["float16", "bfloat16", "float32", "float64"]
    explicit: tuple[StrictBool, ...]


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


def tiered_facts(facts: Mapping[str, Any]) -> TieredFacts | None:
    """What a header says of a tiered layer; ``None`` for one that is empty. Raises ``ConfigError`` for anything else."""
    return None if facts == {"initialized": False} else TieredFacts.model_validate(facts)


def tiered_layer(
    like: TieredLayer, facts: TieredFacts | None, tensors: Mapping[str, Tensor], most_heads: int
) -> TieredLayer:
    """A layer of ``like``'s plan with a saved state, its quantizers left alone.

    Args:
        like: gives the plan, and how steps run.
        facts: what the header says of it; ``None`` for an empty layer.
        tensors: the layer's own, by name.
        most_heads: KV heads that the model has: tensors without elements can claim any number.

    Raises:
        CheckpointError: for a state that no such layer can have.
    """
    layer = TieredLayer(like.plan, like.max_length)
    layer.steps.compiles, layer.steps.checks_masks = like.steps.compiles, like.steps.checks_masks
    if facts is None:
        _check(not tensors, "layer without tokens, which has tensors,")
        return layer
    dtype = getattr(torch, facts.dtype)
    window = under(tensors, "window.")
    keys, values, padding = window["keys"], window["values"], tensors["padding"].cpu().clone()
    _check(keys.dim() == values.dim() == 4 and keys.dtype == values.dtype == dtype, "keys and values of the window")
    # room is made for as many rows, heads and channels as these say: before, each must be told by something that is held
    batch, heads, slots, _ = keys.shape
    _check(padding.shape == (batch,) == window["lengths"].shape == (len(facts.since_ranking),), "number of rows")
    _check(heads <= most_heads and (slots > 0 or bool(like.plan.ladder.tiers)), "number of heads and tokens")
    _check(_within(padding, 0, facts.logical), "padding")
    try:
        layer.lazy_initialization(keys[:, :, :0], values[:, :, :0])
    except InputError as error:
        raise CheckpointError(str(error)) from error
    held = layer.held
    held.logical, held.padding = facts.logical, padding
    held.ranked_at = held.logical - torch.tensor(facts.since_ranking, dtype=torch.long)
    _check_names(held, len(facts.explicit), tensors)
    _check_window(held.window, window, held.logical)
    tokens = {name: window[name] for name in held.window.slots.tensors if name != "shift"}
    held.window.assign(tokens | {"positions": window["positions"][:, None]}, window["lengths"].cpu())
    if held.queries is not None:
        _check_queries(under(tensors, "queries."), batch, keys.shape[3])
        held.queries.load(under(tensors, "queries."), keys.device)
    for i, (store, explicit) in enumerate(zip(held.stores, facts.explicit, strict=True)):
        own = under(tensors, f"store{i}.")
        if explicit:
            store.table.store_positions()
        _check_store(store, own, held.logical)
        load_store(store, own)
    stored = held.window.lengths[:, None] + sum(s.lengths for s in held.stores)
    evicts = held.plan.ladder.bounded
    _check(
        bool((stored <= held.lengths[:, None] if evicts else stored == held.lengths[:, None]).all()), "number of tokens"
    )
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
    except BaseException as error:
        for quantizer, before in done:
            quantizer.load_state_dict(before)
        if isinstance(error, DAMAGED):
            raise CheckpointError(f"what quantizers have learnt is damaged in the saved cache: {error}") from error
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
    _check(_within(positions.cpu()[live], 0, logical - 1, torch.int32), "positions of the window")
    ascend = positions.cpu().diff(dim=1) > 0  # [B, slots - 1]
    _check(bool((ascend | ~live[:, 1:]).all()), "order of the window's positions")
    for side in ("keys", "values"):
        _check(bool(state[side].isfinite().all()), f"{side} of the window, which hold NaN or infinity,")
    for name in window.statistics:
        _check_statistic(state[f"statistic.{name}"], (batch, heads, slots), f"statistic {name} of the window")


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
    live = table >= 0
    _check(torch.equal(live, store.table.present(counts > 0)), f"table of {what}")
    # tiles in use are the first of each row and head, and some row and head uses all: room is made for as many
    used, tiles = live.sum(-1), torch.arange(shape[2])
    _check(torch.equal(live, tiles < used[..., None]) and int(used.max()) == shape[2], f"table of {what}")
    ids = (
        table.masked_fill(~live, -1).flatten(1).sort(dim=1).values
    )  # [B, H_kv * tiles]; rows may share tiles, heads do not
    _check(bool(((ids.diff(dim=1) > 0) | (ids[:, 1:] < 0)).all()), f"table of {what}")
    if store.table.stores_positions:
        offsets = state["offsets"].cpu()
        _check(offsets.shape == (*shape, store.tile), f"positions of {what}")
        real = torch.arange(store.tile) < counts[..., None]
        _check(_within(offsets[real], 0, logical - 1, torch.int32), f"positions of {what}")
        _check(bool(((offsets.diff(dim=3) > 0) | ~real[..., 1:]).all()), f"order of the positions of {what}")
    else:
        _check(_within(starts[counts > 0], 0, logical - 1), f"positions of {what}")
        _check(_within((starts + counts)[counts > 0], 1, logical), f"positions of {what}")
    for name in store.statistics:
        _check_statistic(state[f"statistic.{name}"], (*shape, store.tile), f"statistic {name} of {what}")


def _check_statistic(found: Tensor, shape: tuple[int, ...], what: str) -> None:
    _check(found.shape == shape and found.dtype == torch.float32 and bool(found.isfinite().all()), what)


def _check_names(held: LayerContents, tiers: int, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a state of another number of tiers, and tensors that no such layer has or lacks."""
    _check(tiers == len(held.stores), "number of tiers")
    notes = [name for name in held.window.slots.tensors if name.startswith("statistic.")]
    known = {"padding", *(f"window.{name}" for name in ("keys", "values", "positions", "lengths", *notes))}
    for i, store in enumerate(held.stores):
        own = ("table", "counts", "starts", "offsets", *notes, *(f"pool.{field}" for field in store.pool.fields))
        known |= {f"store{i}.{name}" for name in own}
    missing = known - tensors.keys()
    _check(not missing, f"layer without {', '.join(sorted(missing))}")
    learnt = tuple(f"quantizer{i}.{side}." for i in range(tiers) for side in "kv")  # quantizers check their own
    learnt += () if held.queries is None else ("queries.",)
    unknown = [name for name in tensors if name not in known and not name.startswith(learnt)]
    _check(not unknown, f"layer with {', '.join(sorted(unknown))}")


def _check_queries(state: Mapping[str, Tensor], batch: int, dim: int) -> None:
    heads = state["mean"].shape[1] if state and state["mean"].dim() == 3 else 0
    shapes = {"weight": (batch,), "mean": (batch, heads, dim), "scatter": (batch, heads, dim, dim)}
    fits = all(t.shape == shapes.get(name) and t.dtype == torch.float32 for name, t in state.items())
    _check(fits and all(bool(t.isfinite().all()) for t in state.values()), "statistics of the queries")


def _within(numbers: Tensor, low: int, high: int, dtype: torch.dtype = torch.long) -> bool:
    return numbers.dtype == dtype and bool(((numbers >= low) & (numbers <= high)).all())


def _check(fits: bool, what: str) -> None:
    if not fits:
        raise CheckpointError(f"the {what} cannot be right")


# --- layers of transformers' own ---


class OtherFacts(FileHeader):
    """What a header says of a layer that FADE does not compress: its class, and each attribute as ``_written`` gave it."""

    type: str
    attributes: dict[str, dict[str, JsonValue]]


def other_state(layer: Any) -> tuple[Facts, Tensors]:
    """Attributes of a layer that FADE does not compress: a sliding window, the states of linear attention.

    Raises:
        CheckpointError: if it keeps something that is neither a tensor nor a plain value.
    """
    tensors: Tensors = {}
    facts = {name: _written(value, f"{type(layer).__name__}.{name}", tensors) for name, value in vars(layer).items()}
    return {"type": type(layer).__name__, "attributes": facts}, tensors


def other_layer(
    like: Any, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device, held: TieredFacts | None
) -> Any:
    """A copy of ``like`` with saved attributes.

    Args:
        like: a layer of transformers' own.
        facts: what the header says of it.
        tensors: the layer's own, by name.
        device: where its tensors go.
        held: what the header says of the tiered layers; ``None`` if they are empty.

    Raises:
        CheckpointError: if it is a layer of another class, or a state that it cannot have.
    """
    found = OtherFacts.model_validate(facts)
    if found.type != type(like).__name__:
        raise CheckpointError(f"a {found.type} was saved where the model has a {type(like).__name__}")
    layer, left = copy.copy(like), dict(tensors)
    for name, written in found.attributes.items():
        what = f"attribute {name!r} of a {found.type}"
        _check(name.isidentifier() and not _is_code(type(like), name), what)
        value, before = _read(written, left, device), vars(like).get(name)
        if name in _FIXED or isinstance(before, (bool, str)):
            _check(type(value) is type(before), what)
        if name in _FIXED:
            _check(torch.equal(torch.as_tensor(value), torch.as_tensor(before).to(device)), what)
        _check(not isinstance(value, float) or math.isfinite(value), what)
        _check(type(value) is not int or 0 <= value <= LARGEST, what)
        setattr(layer, name, value)
    _check(not left, f"layer with {', '.join(sorted(left))}")
    missing = vars(like).keys() - found.attributes.keys() - set(_LATER)
    _check(not missing, f"layer without {', '.join(sorted(missing))}")
    _check_other(layer, held)
    return layer


_FIXED = ("sliding_window", "_sliding_window_tensor")
"""Attributes that a model's configuration decides."""
_LATER = ("dtype", "device", "batch_size", "num_heads", "k_head_dim", "v_head_dim")
"""Attributes that a layer has from its first token on."""


def _check_other(layer: Any, held: TieredFacts | None) -> None:
    """Refuse a state that does not go with the tiered layers': other rows, another length, numbers that are none."""
    rows = 0 if held is None else len(held.since_ranking)
    states = [
        state for name in ("conv_states", "recurrent_states") for state in (getattr(layer, name, None) or {}).values()
    ]
    kept = [getattr(layer, name, None) for name in ("keys", "values")]
    what = f"tensors of a {type(layer).__name__}"
    for tensor in [*states, *kept]:
        if isinstance(tensor, Tensor) and tensor.numel():
            _check(held is not None and len(tensor) == rows and bool(tensor.isfinite().all()), what)
    if isinstance(kept[0], Tensor) and isinstance(kept[1], Tensor):
        _check(kept[0].shape[:-1] == kept[1].shape[:-1], what)
    if not isinstance(layer, LinearAttentionCacheLayerMixin):
        length = int(layer.get_seq_length())
        _check(length == (0 if held is None else held.logical), f"length of a {type(layer).__name__}, {length},")


def _is_code(kind: type, name: str) -> bool:
    found = getattr(kind, name, None)
    return name.startswith("__") or callable(found) or isinstance(found, property)


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


def _read(written: Mapping[str, Any], tensors: Tensors, device: torch.device) -> Any:
    """What ``_written`` wrote; a tensor is taken out of ``tensors``."""
    ((kind, value),) = written.items()
    if kind == "value":
        _check(value is None or isinstance(value, (bool, int, float, str)), f"value {shown(value)}")
        return value
    if kind == "tensor":
        return tensors.pop(value).to(device).clone()
    if kind == "dtype":
        _check(isinstance(getattr(torch, value, None), torch.dtype), f"dtype {shown(value)}")
        return getattr(torch, value)
    if kind == "device":
        return device
    if kind == "by_index":
        return {int(key): _read(item, tensors, device) for key, item in value.items()}
    raise CheckpointError(f"an attribute is written as {shown(kind)}, which this version does not know")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
