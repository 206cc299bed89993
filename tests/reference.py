"""Dense references: the same quantised values through a plain masked softmax, written without FADE's attention.

``dense_cache`` keeps every token at its place in one dense tensor and decides by itself which tokens are quantised
(for ladders that nothing bounds). ``Recording`` and ``replay_cache`` take over from a run of a tiered cache which
tokens were stored at each step, and with which values; everything else (masks, order of rows, attention) is dense.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from fade_core import FadeConfig, Quantizer, TieredKVCache
from fade_core.cache.layer import TieredLayer
from fade_core.interfaces import QuantizerContext
from fade_core.packed import Packed
from fade_core.storage.tier_store import TierStore

DENSE = "dense_reference"


# --- attention -----------------------------------------------------------------------------------------------------


def dense_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention in float64, nothing clever; ``key.hidden`` (bool ``[B, H_kv, T]``) marks tokens that are gone."""
    queries, tokens, groups = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    seen = attention_mask
    if seen is None:
        seen = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]
    elif seen.dtype != torch.bool:
        seen = seen == 0
    hidden = getattr(key, "hidden", None)
    if hidden is not None:
        seen = seen & ~hidden.repeat_interleave(groups, 1)[:, :, None]
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    logits = query.double() @ keys.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    logits = logits.masked_fill(~seen, -torch.inf)
    if s_aux is not None:
        sink = s_aux.double().view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
        logits = torch.cat([logits, sink], -1)
    weights = logits.softmax(-1).nan_to_num(0)[..., :tokens]
    return (weights @ values).to(query.dtype).transpose(1, 2).contiguous(), None


AttentionInterface.register(DENSE, dense_attention)
AttentionMaskInterface.register(DENSE, sdpa_mask)


@contextlib.contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Run ``model`` with the attention ``name`` inside the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


# --- a dense cache that quantises by itself ---------------------------------------------------------------------------


class DenseLayer(DynamicLayer):
    """All tokens at their columns; those old enough are replaced by their quantised selves, tile by tile.

    A row is its padding, ``n_sink`` exact tokens, then quantised ones up to the column ``edge``, then exact ones.
    While past states are recorded (assisted decoding) nothing is quantised before the rejected tokens are cropped.
    """

    def __init__(self, config: FadeConfig, keys: Quantizer, values: Quantizer, padding: Tensor | None) -> None:
        super().__init__()
        self.config, self.quantizers, self.padding = config, (keys, values), padding
        self.record_past = False
        self.edge = torch.zeros(0, dtype=torch.long)

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            padding = self.padding if self.padding is not None else torch.zeros(len(key_states), dtype=torch.long)
            self.edge = padding.repeat_interleave(len(key_states) // len(padding)) + self.config.n_sink
        self.quantise()
        seen = super().update(key_states, value_states)
        if not self.record_past:
            self.quantise()
        return seen

    def quantise(self) -> None:
        if not self.get_seq_length():
            return
        tile, window = self.config.tile, self.config.recent_window
        self.keys, self.values = self.keys.clone(), self.values.clone()  # what attention holds stays as it is
        for row in range(len(self.edge)):
            while self.get_seq_length() - int(self.edge[row]) >= window + tile:
                part = (slice(row, row + 1), slice(None), slice(int(self.edge[row]), int(self.edge[row]) + tile))
                for held, quantizer in zip((self.keys, self.values), self.quantizers, strict=True):
                    held[part] = quantizer.decode(quantizer.encode(held[part]))
                self.edge[row] += tile

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        self.edge = self.edge.clamp_max(self.get_seq_length())
        self.quantise()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.edge = self.edge[indices]

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.edge = self.edge.repeat_interleave(repeats)

    @property
    def quantised(self) -> int:
        """Tokens of the first row that are quantised."""
        return int(self.edge[0]) - self.config.n_sink - (int(self.padding[0]) if self.padding is not None else 0)


def dense_cache(model: PreTrainedModel, config: FadeConfig, padding: Tensor | None = None) -> DynamicCache:
    """A ``DynamicCache`` whose full-attention layers hold what a tiered cache of ``config`` would.

    Args:
        model: the model that will run with ``DENSE`` attention.
        config: one unbounded rung.
        padding: leading columns of each row that are padding, int64 ``[B]``.
    """
    (rung,) = config.resolved_ladder()
    assert rung.capacity == "rest"
    assert config.policy.budget is None
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            head_dim = _head_dim(model)
            quantizers = (
                side.build(QuantizerContext(head_dim, name, config.tile, index, len(cache.layers)))  # type: ignore[arg-type]
                for side, name in ((rung.keys, "key"), (rung.values, "value"))
            )
            cache.layers[index] = DenseLayer(config, *quantizers, padding)
    return cache


def _head_dim(model: PreTrainedModel) -> int:
    text = model.config.get_text_config()
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


# --- what a tiered layer stores, read by a second reader -----------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """Tokens of a layer at their logical positions.

    Attributes:
        keys: ``[B, H_kv, logical, D]``, zeros where nothing is stored.
        values: likewise.
        tier: int64 ``[B, H_kv, logical]``: 0 full precision, ``i`` the ladder's ``i``-th tier, -1 nowhere.
    """

    keys: Tensor
    values: Tensor
    tier: Tensor


def stored(layer: TieredLayer) -> Stored:
    """Read a layer slot by slot. A position stored twice, or beyond the logical length, is an ``AssertionError``."""
    window = layer.held.window
    assert window is not None
    batch, heads, _, dim = window.keys.shape
    keys = window.keys.new_zeros(batch, heads, layer.logical, dim)
    values = window.values.new_zeros(batch, heads, layer.logical, window.values.shape[-1])
    tier = torch.full((batch, heads, layer.logical), -1)

    def put(rows: Tensor, heads_: Tensor, positions: Tensor, level: int, k: Tensor, v: Tensor) -> None:
        at = (rows, heads_, positions.long())
        assert bool(((at[2] >= 0) & (at[2] < layer.logical)).all()), (layer.index, level, positions.tolist())
        assert bool((tier[at] == -1).all()), f"layer {layer.index}: a token of tier {level} is in a finer tier too"
        flat = (rows * heads + heads_) * layer.logical + at[2]
        assert len(flat.unique()) == len(flat), f"layer {layer.index}: tier {level} has a token twice"
        tier[at], keys[at], values[at] = level, k, v

    slots = torch.arange(window.keys.shape[2]).expand(batch, heads, -1)
    rows, heads_, slot = (slots < window.lengths[:, None, None]).nonzero(as_tuple=True)
    at = (rows, heads_, slot)
    put(rows, heads_, window.live_positions()[rows, 0, slot], 0, window.keys[at], window.values[at])
    for level, store in enumerate(layer.held.stores, start=1):
        if not store.table.live_ids().numel():
            continue
        rows, heads_, n = (store.table.live_ids() >= 0).nonzero(as_tuple=True)
        pool_keys, pool_values = _whole_pool(store)
        tiles, counts = store.table.live_ids()[rows, heads_, n], store.table.live_counts()[rows, heads_, n]
        live = torch.arange(store.tile) < counts[:, None]
        where = store.live_positions().unflatten(2, (-1, store.tile))[rows, heads_, n]
        row, head = (t[:, None].expand_as(where)[live] for t in (rows, heads_))
        put(row, head, where[live], level, pool_keys[tiles][live], pool_values[tiles][live])
    return Stored(keys, values, tier)


def check_tiles(store: TierStore, reserved: bool = False) -> None:
    """No tile of a pool is lost, and none that has yet to be written is anybody else's.

    Args:
        store: the tier's tokens.
        reserved: whether tiles for all that may come are there from the beginning; else at most a quarter, and two a row
            and head, are spare.
    """
    pool, held = store.pool, store.table.live_ids() >= 0
    ids, times = store.table.live_ids()[held].unique(return_counts=True)
    assert not len(ids) or int(ids[-1]) < pool.capacity
    unwritten = store.table.live_ids()[held & (store.table.live_counts() == 0)]
    assert int(times[torch.isin(ids, unwritten)].sum()) == len(unwritten), "a reserved tile is in two places"
    for row in store.table.live_ids().flatten(0, 1):
        assert len(row[row >= 0].unique()) == int((row >= 0).sum()), "a row and head has a tile twice"
    if not reserved:
        spare = 2 * store.table.live_ids().shape[0] * store.table.live_ids().shape[1]
        assert len(ids) + spare >= 0.75 * pool.capacity, "tiles that nobody holds are not freed"


def _whole_pool(store: TierStore) -> tuple[Tensor, Tensor]:
    """Every tile of the pool decoded, ``[capacity, tile, D]``; free ones decode to anything."""
    sides = []
    for prefix, quantizer in (("k.", store.tier.keys), ("v.", store.tier.values)):
        fields = {n[2:]: t[None, None] for n, t in store.pool.fields.items() if n.startswith(prefix)}
        tiles = store.pool.capacity
        if not tiles:
            sides.append(torch.zeros(0, store.tile, quantizer.head_dim))
            continue
        decoded = quantizer.decode(Packed(fields, tiles * store.tile, store.layout.dtype))
        sides.append(decoded[0, 0].unflatten(0, (tiles, store.tile)))
    return sides[0], sides[1]


# --- replaying the schedule of a tiered run ---------------------------------------------------------------------------


class Recording:
    """Notes what each tiered layer of a cache holds right before every ``update``."""

    def __init__(self, cache: TieredKVCache) -> None:
        self.steps: list[list[Stored]] = [[] for _ in cache.layers]
        update = cache.update

        def recorded(keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            layer = cache.layers[layer_idx]
            if isinstance(layer, TieredLayer) and layer.is_initialized:
                layer.settle()
                if layer.record_past:
                    layer.maintain()
                self.steps[layer_idx].append(stored(layer))
            return update(keys, values, layer_idx, *args, **kwargs)

        cache.update = recorded  # type: ignore[method-assign]


class ReplayLayer(DynamicLayer):
    """Shows attention the recorded past beside the exact new tokens; keeps the exact past to compare the record with.

    Args:
        steps: what the tiered layer held before each update but the first.
        ladder: names of the tiers, the window's "fp16" first.
    """

    def __init__(self, steps: list[Stored], ladder: tuple[str, ...]) -> None:
        super().__init__()
        self.steps, self.ladder = iter(steps), ladder

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return super().update(key_states, value_states)
        past = next(self.steps)
        self.compare(past)
        super().update(key_states, value_states)
        keys = torch.cat([past.keys, key_states], 2)
        keys.hidden = torch.cat([past.tier < 0, torch.zeros(key_states.shape[:3], dtype=torch.bool)], 2)  # type: ignore[attr-defined]
        return keys, torch.cat([past.values, value_states], 2)

    def compare(self, past: Stored) -> None:
        """Every stored token must be the exact one of its position, up to what its tier loses."""
        assert past.keys.shape == self.keys.shape
        for held, exact in ((past.keys, self.keys), (past.values, self.values)):
            worst = excess(held, exact, past.tier, self.ladder)
            assert worst <= 1, f"a token of {worst} times the error that its tier's grid can make"


STEPS = {"fp16": 0.0, "int4": 1 / 30, "int2": 1 / 6 + 1 / 30}
"""Half a step of each tier's grid as a share of the range it spans; int2 may be coded from what int4 left."""


def excess(held: Tensor, exact: Tensor, tier: Tensor, ladder: Sequence[str]) -> float:
    """Largest error of any stored element over what its grid can make of the exact one: at most 1 for the right token.

    A grid spans at most its token or at most its channel, and its fp16 scale and minimum round by 2^-11 each.

    Args:
        held: ``[B, H_kv, T, D]``; likewise ``exact``.
        tier: ``[B, H_kv, T]``, an index of ``ladder``; -1 where nothing is stored.
        ladder: names of the tiers, all of them in ``STEPS``.
    """
    spans = [exact.amax(dim, keepdim=True) - exact.amin(dim, keepdim=True) for dim in (-1, -2)]
    span = torch.maximum(*torch.broadcast_tensors(*spans))
    rounding = 2.0**-10 * exact.abs().amax((-1, -2), keepdim=True)
    step = torch.tensor([STEPS[name] for name in ladder])[tier.clamp(min=0)][..., None]
    share = (held - exact).abs() / (step * span + rounding * (step > 0) + 1e-6 * exact.std())
    return float(share[tier >= 0].max()) if bool((tier >= 0).any()) else 0.0


def replay_cache(model: PreTrainedModel, recording: Recording, ladder: tuple[str, ...]) -> Cache:
    """A cache that replays ``recording`` on ``model`` under ``DENSE`` attention."""
    cache = DynamicCache(config=model.config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = ReplayLayer(recording.steps[index], ladder)
    return cache
