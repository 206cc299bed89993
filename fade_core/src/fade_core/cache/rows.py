"""Rows of a cache come and go: two caches of one model become one, and columns that every row only pads are cut off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fade_core.cache.checkpoint import compatible_fields, fingerprint
from fade_core.cache.layer import TieredLayer
from fade_core.cache.passes import PassControl
from fade_core.errors import InputError
from fade_core.eviction.byte_budget import ByteBudget

_SLIDING = "DynamicSlidingWindowLayer"
_LINEAR = "LinearAttentionLayer"
_EMPTY = "DummyLayer"


def join(cache: PassControl, other: PassControl) -> tuple[int, int]:
    """Put ``other``'s rows behind ``cache``'s, layer by layer, and leave ``other`` empty.

    Keys keep the rotation that they have; the rows that have seen less get padding on the left.

    Returns:
        columns of padding that ``cache``'s and ``other``'s rows got.

    Raises:
        InputError: if they cannot be one cache; nothing has changed then.
    """
    lengths = _checked(cache, other)
    target = max(lengths)
    shifts = target - lengths[0], target - lengths[1]
    for own, theirs in zip(cache.layers, other.layers, strict=True):
        if isinstance(own, TieredLayer):
            shift(own, shifts[0])
            shift(theirs, shifts[1])
            join_layer(own, theirs)
            theirs.reset()
        elif _is_sliding(own):
            _join_sliding(own, theirs, target)
        elif type(own).__name__ == _LINEAR:
            _join_states(own, theirs)
    other.reset()
    return shifts if lengths[0] else (0, shifts[1])


def keep(cache: PassControl, rows: Tensor, trim: bool) -> int:
    """Keep ``rows`` (int64 ``[n]`` or bool ``[B]``), in this order, and cut off what is padding in all of them.

    Returns:
        columns that were cut off.

    Raises:
        InputError: for no row, one twice or one that does not exist; nothing has changed then.
    """
    rows = _rows(cache, rows)
    cache.settle()
    cache.reorder_cache(rows)  # layers of linear attention know no other way to choose rows
    common = min(int(cache.tiered[0].held.padding.min()), cache.get_seq_length() - 1) if trim else 0
    if not common:
        return 0  # one column stays even if no row has a token yet: a cache without length is an empty one
    for layer in cache.layers:
        if isinstance(layer, TieredLayer):
            shift(layer, -common)
        elif _is_sliding(layer):
            layer.cumulative_length -= common
            held = min(layer.keys.shape[2], layer.cumulative_length)
            layer.keys, layer.values = (t[:, :, t.shape[2] - held :].clone() for t in (layer.keys, layer.values))
    return common


# --- what is refused ---


def _checked(cache: PassControl, other: PassControl) -> tuple[int, int]:
    """Logical lengths of both. Raises ``InputError`` unless they can be joined."""
    if not isinstance(other, type(cache)):
        raise InputError(
            f"a {type(other).__name__} cannot join a {type(cache).__name__}; make both with create_tiered_cache"
        )
    if other is cache:
        raise InputError("a cache cannot join itself; batch_repeat_interleave repeats rows")
    if fingerprint(cache.model_config) != fingerprint(other.model_config) or len(cache.layers) != len(other.layers):
        raise InputError("the caches belong to models of different shapes; rows can only join those of the same model")
    if cache.weights_fingerprint != other.weights_fingerprint:
        raise InputError(
            "the caches belong to models with different weights; rows can only join those of the same model"
        )
    if (
        compatible_fields(cache.config.to_dict()) != compatible_fields(other.config.to_dict())
        or cache.attention != other.attention
    ):
        raise InputError("the caches have different configurations; make both with the same one")
    if not other.get_seq_length():
        raise InputError("the cache that should join holds no tokens; run its prompt through the model first")
    lengths = _resting(cache, "this cache"), _resting(other, "the cache that should join")
    if cache.length_limit is not None and lengths[1] > cache.length_limit:
        raise InputError(
            f"the cache that should join holds {lengths[1]} tokens, more than max_cache_len={cache.length_limit} of this one; "
            "create the cache with a larger max_cache_len"
        )
    for index, (own, theirs) in enumerate(zip(cache.layers, other.layers, strict=True)):
        if isinstance(own, TieredLayer):
            _check_tiered(own, theirs)
        elif type(own).__name__ not in (_SLIDING, _LINEAR, _EMPTY) or type(theirs) is not type(own):
            raise InputError(
                f"layer {index} is a {type(theirs).__name__} of transformers, whose rows FADE cannot put behind those of a "
                f"{type(own).__name__}; decode these caches one after the other"
            )
    cache.settle()
    other.settle()
    return lengths


def _resting(cache: PassControl, what: str) -> int:
    """Logical length of a cache that nothing is under way in. Raises ``InputError``."""
    for layer in cache.layers:
        if getattr(layer, "record_past", False):
            raise InputError(f"{what} records the past for assisted decoding; let generate end before rows come or go")
        if isinstance(layer, TieredLayer) and (layer.holding or layer.reading):
            raise InputError(f"{what} is inside a block of holding() or reading(); rows come or go after it")
    if cache.under_way:
        raise InputError(
            f"a forward pass of {what} was interrupted; settle() takes it back, and rows come or go after it"
        )
    return int(cache.get_seq_length())


def _check_tiered(own: TieredLayer, theirs: TieredLayer) -> None:
    """Refuse tokens that ``own`` cannot hold. Raises ``InputError``."""
    if own.is_initialized and (own.dtype, own.device) != (theirs.dtype, theirs.device):
        raise InputError(
            f"layer {own.index}: this cache holds {own.dtype} on {own.device}, the other {theirs.dtype} on {theirs.device}"
        )
    rows = max(0, own.batch_size) + theirs.batch_size
    budget = own.plan.ladder.budget
    if isinstance(budget, ByteBudget) and budget.shortfall(rows):
        raise InputError(f"layer {own.index}: {budget.shortfall(rows)}")
    for here, there in zip(own.plan.ladder.tiers, theirs.plan.ladder.tiers, strict=True):
        for side, ours, other in (("keys", here.keys, there.keys), ("values", here.values, there.values)):
            states = ours.state_dict(), other.state_dict()
            if not (ours.learns and not own.is_initialized) and not _same(*states):
                raise InputError(
                    f"layer {own.index}: the quantizer {ours.kind!r} of the {side} reads codes with what it learnt from its "
                    "own prompt, or was given; the two caches have different ones and cannot share. Use a quantizer that is "
                    "calibrated ahead (a calibration file), or decode these caches one after the other"
                )


def _same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(t, other[name].to(t.device)) for name, t in one.items())


def _rows(cache: PassControl, rows: Tensor) -> Tensor:
    """``rows`` as int64 indices on the CPU. Raises ``InputError``."""
    length = _resting(cache, "this cache")
    batch = cache.tiered[0].batch_size
    if not length:
        raise InputError("the cache is empty: it has no rows to keep")
    if not rows.numel():
        raise InputError("no row would be left; reset() empties the cache")
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex():
        raise InputError(
            f"rows are {rows.dtype} {tuple(rows.shape)}; row numbers [n] or bool [B] = [{batch}] are needed"
        )
    if rows.dtype == torch.bool:
        if len(rows) != batch:
            raise InputError(f"rows are bool [{len(rows)}]; the cache has {batch} rows")
        rows = rows.nonzero().flatten()
    rows = rows.cpu().long()
    if not len(rows):
        raise InputError("no row would be left; reset() empties the cache")
    if bool(((rows < 0) | (rows >= batch)).any()):
        raise InputError(f"rows must be 0..{batch - 1}; found {rows.tolist()}")
    if len(rows.unique()) < len(rows):
        raise InputError(f"rows {rows.tolist()} name one twice; batch_select_indices repeats rows")
    return rows


# --- tiered layers ---


def shift(layer: TieredLayer, by: int) -> None:
    """Every row has ``by`` more columns of padding on its left (fewer, if negative); keys stay as they are."""
    if layer.is_initialized and by:
        layer.held.shift(by)
        layer.changed()


def join_layer(own: TieredLayer, theirs: TieredLayer) -> None:
    """Put copies of ``theirs``' rows behind ``own``'s; both have the same logical length, or ``own`` is empty."""
    there = theirs.held
    if not own.is_initialized:
        own.lazy_initialization(there.window.keys[:0], there.window.values[:0])
        own.held.logical = there.logical
        for here, store in zip(own.held.stores, there.stores, strict=True):
            here.tier.keys.load_state_dict(store.tier.keys.state_dict())
            here.tier.values.load_state_dict(store.tier.values.state_dict())
    own.held.join(there)
    own.changed()


# --- layers of transformers' own ---


def _is_sliding(layer: Any) -> bool:
    return type(layer).__name__ == _SLIDING


def _join_sliding(own: Any, theirs: Any, length: int) -> None:
    """The newest tokens of both, right-aligned as their columns of the mask are; zeros where a row has padding."""
    if not own.is_initialized:
        own.lazy_initialization(theirs.keys, theirs.values)
        own.keys, own.values = theirs.keys, theirs.values
    else:
        held = max(own.keys.shape[2], theirs.keys.shape[2])

        def both(one: Tensor, other: Tensor) -> Tensor:
            return torch.cat([torch.nn.functional.pad(t, (0, 0, held - t.shape[2], 0)) for t in (one, other)])

        own.keys, own.values = both(own.keys, theirs.keys), both(own.values, theirs.values)
    own.cumulative_length = length


def _join_states(own: Any, theirs: Any) -> None:
    """States of linear attention know no columns: they stand one below the other."""
    for kind in ("conv_states", "recurrent_states"):
        held, more = getattr(own, kind), getattr(theirs, kind)
        for index, state in more.items():
            if state is not None:
                fresh = held[index] is None or not own.has_previous_state[index]
                held[index] = state if fresh else torch.cat([held[index], state])
                more[index] = None
                started = f"is_{kind}_initialized"
                getattr(own, started)[index], getattr(theirs, started)[index] = True, False
    own.device, own.dtype = theirs.device, theirs.dtype
    own.conv_kernel_size.update(theirs.conv_kernel_size)
    own.has_previous_state.update(theirs.has_previous_state)
