"""Looking into a layer: where its tokens are, what they decode to, and every tensor that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.storage.tier_store import TierStore
from fade_core.storage.window import Window

if TYPE_CHECKING:
    from fade_core.eviction.query_moments import QueryMoments


class HoldsTokens(Protocol):
    """What of a layer this module reads (``TieredLayer``)."""

    index: int
    device: torch.device
    dtype: torch.dtype
    pending: tuple[Tensor, Tensor] | None
    padding: Tensor
    ranked_at: Tensor
    counters: Tensor
    first: Tensor
    queries: QueryMoments | None

    @property
    def logical(self) -> int:
        """Tokens the model has seen."""

    @property
    def window(self) -> Window | None:
        """The full-precision tokens."""

    @property
    def stores(self) -> tuple[TierStore, ...]:
        """The packed tokens, finest tier first."""


def window_of(layer: HoldsTokens) -> Window:
    """The layer's full-precision tokens. Raises ``InputError`` if it has not seen any token yet."""
    window = layer.window
    if window is None:
        raise InputError(f"layer {layer.index} is empty: it has not seen a token yet")
    return window


def tier_map(layer: HoldsTokens) -> Tensor:
    """int64 ``[B, H_kv, logical]``: 0 full precision, ``i`` the ladder's ``i``-th tier, -1 nowhere."""
    window, logical = window_of(layer), layer.logical
    shape = (*window.keys.shape[:2], logical + 1)
    where = torch.full(shape, -1, dtype=torch.long, device=layer.device)
    for level, found in enumerate([window.live_positions(), *(s.positions() for s in layer.stores)]):
        index = found.expand(-1, shape[1], -1)
        where.scatter_(2, index.where(index >= 0, torch.full_like(index, logical)), level)
    return where[..., :logical]


def tensors(layer: HoldsTokens) -> dict[str, Tensor]:
    """Every tensor the layer keeps, as "tier/kind"."""
    window = layer.window
    if window is None:
        return {}
    held = {f"fp16/{n}": t for n, t in window.tensors().items()}
    for store in layer.stores:
        tiled = "tiles." if store.tier.name == "fp16" else ""  # beside the window, which is fp16 too
        held.update(
            {f"{store.tier.name}/{tiled}{n}": t for n, t in {**store.pool.fields, **store.table.tensors()}.items()}
        )
        for side, quantizer in (("k", store.tier.keys), ("v", store.tier.values)):
            held.update({f"{store.tier.name}/{side}.state.{n}": t for n, t in quantizer.state_dict().items()})
    held |= {"layer/padding": layer.padding, "layer/ranked_at": layer.ranked_at, "layer/counters": layer.counters}
    held["layer/first"] = layer.first
    if layer.queries is not None:
        held.update({f"layer/queries.{n}": t for n, t in layer.queries.tensors().items()})
    if layer.pending is not None:
        held["layer/pending.keys"], held["layer/pending.values"] = layer.pending
    return held


def nbytes(layer: HoldsTokens) -> int:
    """Bytes of all tensors held, each storage once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(layer).values()}
    return sum(storages.values())


def dense_shape(layer: HoldsTokens, side: str) -> tuple[int, int, int, int]:
    """Shape ``[B, H_kv, logical, D]`` that a handle on "key" or "value" shows, whatever is stored."""
    window = window_of(layer)
    held = window.keys if side == "key" else window.values
    return (held.shape[0], held.shape[1], layer.logical, held.shape[3])


def dense(layer: HoldsTokens, side: str) -> Tensor:
    """Dequantised tokens at their logical positions; zeros where nothing is stored (padding).

    Raises:
        InputError: if tokens were evicted: zeros would then change the answer.
    """
    window, pending = window_of(layer), layer.pending
    batch, heads, logical, dim = dense_shape(layer, side)
    total = int((logical - layer.padding).sum()) * heads
    have = int(window.lengths.sum()) * heads + sum(int(store.lengths.sum()) for store in layer.stores)
    have += 0 if pending is None else batch * heads * pending[0].shape[2]
    if have < total:
        raise InputError(
            f"layer {layer.index} has evicted {total - have} tokens, which stock attention cannot leave out; "
            "use FADE's attention (config attention = 'fade') or a ladder without eviction"
        )
    padded = torch.zeros((batch, heads, logical + 1, dim), dtype=layer.dtype, device=layer.device)
    parts = [(window.live()[0 if side == "key" else 1], window.live_positions())]
    for store in layer.stores:
        if store.tiles:
            view, tier = store.view(), store.tier
            decoded = (
                tier.keys.decode(view.packed_keys()) if side == "key" else tier.values.decode(view.packed_values())
            )
            parts.append((decoded, store.positions()))
    for tokens, positions in parts:
        where = positions.expand(-1, heads, -1)
        where = where.where(where >= 0, torch.full_like(where, logical))
        padded.scatter_(2, where[..., None].expand_as(tokens), tokens)
    if pending is not None:
        chunk = pending[0 if side == "key" else 1]
        padded[:, :, logical - chunk.shape[2] : logical] = chunk
    return padded[:, :, :logical]
