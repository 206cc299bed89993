"""One layer of the cache: a full-precision window over a ladder of packed tiers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fade_core.cache.handle import Handle
from fade_core.cache.layer_plan import LayerPlan
from fade_core.errors import InputError
from fade_core.eviction.assignment import assign
from fade_core.eviction.byte_budget import ByteBudget
from fade_core.eviction.ladder import whole
from fade_core.eviction.query_moments import QueryMoments
from fade_core.eviction.ranking import pour, rank
from fade_core.eviction.view import Contents
from fade_core.interfaces import Event, Kernel, PromptView
from fade_core.ops.attention import READ_AT_ONCE, FullSegment, PackedSegment, Segment
from fade_core.storage.repositioning import Shift, Shifts
from fade_core.storage.tier_store import TierStore, Tokens
from fade_core.storage.window import Window
from fade_core.support.checks import check_room, check_tokens
from fade_core.support.transfer import sent

DIRECT_QUERIES = 32
"""Steps of at most this many tokens go straight into the window; longer ones are chunks of a prompt."""

REJECTABLE = 64
"""Newest tokens of a chunk that stay in full precision until ``crop`` while past states are recorded."""


@dataclass(frozen=True)
class _Before:
    """Where a layer stood before the forward pass that is under way."""

    logical: int
    since_ranking: Tensor
    padding: Tensor
    unbroken: bool


class TieredLayer(CacheLayerMixin):
    """Keys and values of one attention layer, compressed as soon as attention has seen them exactly once.

    Outside, the layer has the *logical* length of everything the model has seen; inside, every stored token knows its
    position. Leading padding of a row is never stored.

    Args:
        plan: what the layer is made of.
        max_length: most tokens the layer may see, or ``None``.

    Attributes:
        unbroken: whether each row's window, its sinks aside, is a run of positions up to the newest: the host then knows
            them all. Only tokens that were moved by hand leave gaps.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, plan: LayerPlan, max_length: int | None = None) -> None:
        super().__init__()
        self.plan, self.index, self.max_length = plan, plan.index, max_length
        self.logical = 0
        self.record_past = False
        self.reading = self.holding = False
        self._refused: set[tuple[str, str]] = set()
        self._learners = [q for tier in plan.ladder.tiers for q in (tier.keys, tier.values) if q.learns]
        self._blank()

    def _blank(self) -> None:
        self.is_initialized = False
        self.window: Window | None = None
        self.stores: tuple[TierStore, ...] = ()
        self.queries: QueryMoments | None = None
        self.shifts = Shifts(self.plan.rope) if self.plan.rope is not None else None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.padding = torch.zeros(0, dtype=torch.long)
        self.since_ranking = torch.zeros(0, dtype=torch.long)
        self.logical = 0
        self.unbroken = True
        self._before: _Before | None = None

    # --- what transformers asks ---
    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch size, heads, dtype and device of the first tokens ``[B, H_kv, T, D]``."""
        batch, heads, _, key_dim = key_states.shape
        ladder, tracker = self.plan.ladder, self.plan.tracker
        expected = (ladder.tiers[0].keys.head_dim, ladder.tiers[0].values.head_dim) if ladder.tiers else None
        if expected and expected != (key_dim, value_states.shape[-1]):
            raise InputError(
                f"layer {self.index}: keys and values have head_dim {key_dim} and {value_states.shape[-1]}; this cache was "
                f"built for {expected[0]} and {expected[1]}. Create the cache with the model that fills it."
            )
        if isinstance(ladder.budget, ByteBudget) and ladder.budget.shortfall(batch):
            raise InputError(f"layer {self.index}: {ladder.budget.shortfall(batch)}")
        self.dtype, self.device = key_states.dtype, key_states.device
        statistics = tracker.statistics if ladder.bounded else ()
        self.window, self.stores = self._buffers(batch, heads, key_dim, value_states.shape[-1], statistics)
        if tracker.query_statistics and ladder.bounded:
            self.queries = QueryMoments("query_covariance" in tracker.query_statistics)
        self.padding = torch.zeros(batch, dtype=torch.long)
        self.since_ranking = torch.zeros(batch, dtype=torch.long)
        self.is_initialized = True

    def _buffers(
        self, batch: int, heads: int, key_dim: int, value_dim: int, statistics: tuple[str, ...]
    ) -> tuple[Window, tuple[TierStore, ...]]:
        """An empty window and empty stores for tokens of this shape."""
        ladder = self.plan.ladder
        ranked = ladder.bounded and not self.plan.policy.positional
        slots = ladder.n_sink + ladder.recent_window + ladder.tile
        window = Window(batch, heads, key_dim, value_dim, slots, self.dtype, self.device, statistics)
        codec = self.plan.codec
        stores = (
            TierStore(tier, batch, heads, self.device, self.dtype, ranked, statistics, codec) for tier in ladder.tiers
        )
        return window, tuple(stores)

    def fresh(self) -> TieredLayer:
        """An empty layer of the same plan."""
        return TieredLayer(self.plan, self.max_length)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take the new tokens ``[B, H_kv, Q, D]`` and return what attention should read.

        Raises:
            InputError: wrong shape, dtype, device or batch size.
            NonFiniteError: NaN or infinity.
                Nothing has changed then: layers before this one have been taken back.
        """
        self.commit()
        try:
            key_states, value_states = self._admitted(key_states, value_states)
        except InputError as error:
            outcome = self.plan.on_failure(self.index, self.logical)
            raise type(error)(f"{error} {outcome}".rstrip()) from None
        self.settle()
        if self.record_past:
            self.demote()  # whatever the last verification rejected has been cropped by now
        if self.reading:
            self.pending = (key_states.detach(), value_states.detach())
            self.logical += key_states.shape[2]
            return Handle(self, "key"), Handle(self, "value")
        self._hold()
        window, queries = self._window(), key_states.shape[2]
        first = self.logical == 0
        if first:
            for quantizer in self._learners:
                quantizer.forget()
        position = self.logical
        self.logical += queries
        stock = self.plan.attention == "stock"
        if queries > DIRECT_QUERIES or bool((window.lengths == 0).any()):
            self.pending = (key_states.detach(), value_states.detach())
            if stock and first:
                self.settle()
                return key_states, value_states
        else:
            window.append(key_states, value_states, position)
            self.since_ranking = self.since_ranking + queries
        return Handle(self, "key"), Handle(self, "value")

    def get_seq_length(self) -> int:
        """Logical length: tokens the model has seen, stored or not."""
        return self.logical

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks span the logical length; attention gathers from them by position.

        Raises:
            InputError: if the tokens would pass ``max_length``. The model asks before its first layer runs, whose own
                state (a convolution's, say) could not be taken back.
        """
        check_room(self.index, self.logical, int(query_length), self.max_length)
        return self.logical + int(query_length), 0

    def get_max_length(self) -> int:
        """``max_length`` or -1."""
        return self.max_length if self.max_length is not None else -1

    def activate_past_recording(self) -> None:
        """Assisted decoding starts: newest tokens may be cropped, so demotion waits for ``crop``."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens (0: only do what waited for this call)."""
        if tokens_to_remove > 0:
            raise InputError(f"crop takes a count of tokens to remove, as a negative number; found {tokens_to_remove}")
        if not self.is_initialized:
            return
        self.commit()
        if tokens_to_remove:
            if self.pending is not None:
                self.settle()
            self.logical = max(0, self.logical + tokens_to_remove)
            self._window().crop(self.logical)
            for store in self.stores:
                store.crop(self.logical)
            self.padding = self.padding.clamp_max(self.logical)
            if not self.logical:
                self._blank()
                return
        self.demote()

    def reset(self) -> None:
        """Forget everything and free it."""
        self._blank()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        if not self.is_initialized:
            return
        self.settle()
        self.commit()
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._window().select_rows(indices)
        for store in self.stores:
            store.select_rows(indices)
        if self.queries is not None:
            self.queries.select_rows(indices)
        self.padding, self.since_ranking = self.padding[indices.cpu()], self.since_ranking[indices.cpu()]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times; packed tiles are shared between the copies."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.padding.shape[0]).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first token."""
        return self.padding.shape[0] if self.is_initialized else -1

    # --- what attention asks ---
    @property
    def lengths(self) -> Tensor:
        """Real tokens each row has seen, int64 ``[B]`` on the CPU: the logical length less leading padding."""
        return self.logical - self.padding

    def segments(self, mask: Tensor | None, queries: int) -> list[Segment]:
        """Everything stored, finest last, each with its share of ``mask`` (bool ``[B, 1, Q, logical]`` or ``None``)."""
        window, plain = self._window(), mask is None
        held = [store for store in self.stores if store.tiles]
        masks, shifts = self.masks(mask, queries), self._shifts(mask)
        found: list[Segment] = [
            PackedSegment(store, seen, plain, shift)
            for store, seen, shift in zip(held, masks, shifts, strict=False)  # the window comes after them
        ]
        if window.longest:
            keys, values = window.live()
            if shifts[-1] is not None:
                keys = shifts[-1].moved(keys)
            found.append(FullSegment(keys, values, masks[-1], plain, None if window.even else window.lengths))
        return found

    def masks(self, mask: Tensor | None, queries: int) -> list[Tensor | None]:
        """The share of ``mask`` of each of ``segments``' parts."""
        window = self._window()
        found = [self._gathered(mask, s.positions, s.valid(), queries, s.alike) for s in self.stores if s.tiles]
        if window.longest:
            found.append(self._gathered(mask, window.positions, window.valid(), queries))
        return found

    def _shifts(self, mask: Tensor | None) -> list[Shift | None]:
        """How far each part of what is stored moves; ``mask`` as in ``segments``, over pending tokens too."""
        window = self._window()
        if self.shifts is None:
            return [None] * (sum(store.tiles > 0 for store in self.stores) + (window.longest > 0))
        end, shown = self.logical - (0 if self.pending is None else self.pending[0].shape[2]), None
        if mask is not None:
            shown = mask[:, :, -1, :end].any(1)
            padded = torch.arange(end, device=mask.device) < sent(self.padding, mask.device)[:, None]
            shown = None if bool((shown | padded).all()) else shown
        return self.shifts.of(window, self.stores, end, shown)

    def _gathered(
        self,
        mask: Tensor | None,
        positions: Callable[[], Tensor],
        valid: Tensor | None,
        queries: int,
        alike: bool = True,
    ) -> Tensor | None:
        if mask is None and queries == 1:
            return None if valid is None else valid[:, :, None]
        where = positions()
        if alike:
            where = where[:, :1]
        if mask is None:
            newest = torch.arange(self.logical - queries, self.logical, device=where.device)
            seen = where[:, :, None] <= newest[:, None]
        else:
            index = where.clamp_min(0)[:, :, None].expand(-1, -1, mask.shape[2], -1)
            seen = mask.expand(*where.shape[:2], -1, -1).gather(3, index)
        return seen & (where >= 0)[:, :, None]

    def dense_with_past(self, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Keys and values of ``segments``' tokens and then the pending ones, in full precision ``[B, H_kv, T, D]``.

        ``mask`` is that of the pending queries, bool ``[B, 1, Q, logical]`` or ``None``; it only decides which holes count.
        """
        window, (keys, values) = self._window(), cast(tuple[Tensor, Tensor], self.pending)
        sizes = [store.tiles * store.tile for store in self.stores]
        total = sum(sizes) + window.longest + keys.shape[2]
        both = tuple(t.new_empty((*t.shape[:2], total, t.shape[3])) for t in (keys, values))
        start = 0
        for store, size in zip(self.stores, sizes, strict=True):
            if size:
                store.decode_into(*(t[:, :, start : start + size] for t in both))
                start += size
        for out, held, new in zip(both, window.live(), (keys, values), strict=True):
            out[:, :, start : start + window.longest] = held
            out[:, :, start + window.longest :] = new
        start = 0
        for size, shift in zip([size for size in (*sizes, window.longest) if size], self._shifts(mask), strict=True):
            if shift is not None:
                shift.move(both[0][:, :, start : start + size], READ_AT_ONCE)
            start += size
        return both[0], both[1]

    def fall_back(self, kernel: Kernel, reason: str) -> None:
        """Say, once a reason, that the oracle computes what ``kernel`` refused."""
        self._say_once({"op": kernel.op, "kernel": kernel.name, "reason": reason})

    def _say_once(self, detail: dict[str, str]) -> None:
        if (detail["op"], detail["reason"]) not in self._refused:
            self._refused.add((detail["op"], detail["reason"]))
            self.plan.emit(Event("fallback", self.index, detail=detail))

    @property
    def learning(self) -> bool:
        """Whether a quantizer wants to see the prompt: nothing is encoded yet that it would have to read back."""
        return bool(self._learners) and not any(store.tiles for store in self.stores)

    def learn(self, prompt: PromptView) -> None:
        """Show a prompt to the quantizers that learn from it."""
        ladder = self.plan.ladder
        here = replace(prompt, layer=self.index, n_sink=ladder.n_sink, recent_window=ladder.recent_window)
        for quantizer in self._learners:
            quantizer.observe(here)

    def statistics(self) -> list[dict[str, Tensor]]:
        """Statistics of each of ``segments``' tokens, in the same order: views, updated in place."""
        window = self._window()
        found = [{n: t.flatten(2) for n, t in s.statistics.items()} for s in self.stores if s.tiles]
        if window.longest:
            found.append({n: t[:, :, : window.longest] for n, t in window.statistics.items()})
        return found

    # --- a forward pass that may fail in a later layer ---
    def _hold(self) -> None:
        self._before = _Before(self.logical, self.since_ranking, self.padding, self.unbroken)
        if self.logical:
            self._window().hold()
            for store in self.stores:
                store.hold()
            if self.queries is not None:
                self.queries.hold()

    def commit(self) -> None:
        """The forward pass can no longer fail: what it replaced is freed."""
        if self._before is None:
            return
        self._before = None
        if self.window is not None:
            self.window.let_go()
        for store in self.stores:
            store.let_go()
        if self.queries is not None:
            self.queries.let_go()

    def go_back(self) -> None:
        """Be again as before the forward pass that is under way; nothing happens if none is."""
        before, self._before = self._before, None
        if before is None:
            return
        if not before.logical:
            self._blank()
            return
        self.pending = None
        self.logical, self.since_ranking, self.padding = before.logical, before.since_ranking, before.padding
        self.unbroken = before.unbroken
        self._window().go_back()
        for store in self.stores:
            store.go_back()
        if self.queries is not None:
            self.queries.go_back()

    # --- compression ---
    def settle(self, padding: Tensor | None = None, statistics: Mapping[str, Tensor] | None = None) -> None:
        """Take in what ``update`` left pending and demote what is due. Called right after attention.

        Args:
            padding: leading columns of the pending chunk that are padding, int64 ``[B]`` (CPU), for rows still empty.
            statistics: what attention observed of the pending tokens, float32 ``[B, H_kv, Q]`` a name.
        """
        if self.pending is not None and self.reading:
            self.logical -= self.pending[0].shape[2]
            self.pending = None
        elif self.pending is not None:
            self._absorb(padding, statistics or {})
        elif self.is_initialized and not self.record_past:
            self.demote()

    def restored(self) -> None:
        """A saved state has been put in, its quantizers' included: get ready to go on."""
        if self.is_initialized:
            self._look_for_gaps()
        self.settle()

    def demote(self) -> None:
        """Encode window tiles that are full and re-rank when it is time."""
        if self.holding:
            return
        self._encode_due(False)
        self._rank_due()

    def release(self) -> None:
        """Everything that was held in full precision (``holding``) goes where it belongs, as a prompt would."""
        self.settle()
        self.holding = False
        if self.is_initialized:
            self._encode_due(True)
            self.demote()

    def _encode_due(self, prompt: bool) -> None:
        """Encode what has left the window; ``prompt``: it may be placed on any rung."""
        window, ladder = self._window(), self.plan.ladder
        if not ladder.tiers or window.longest < ladder.n_sink + ladder.recent_window + ladder.tile:
            return
        due = self._due(window.lengths)
        if not bool(due.any()):
            return
        started, before = time.perf_counter(), self.nbytes()
        keys, values = window.live()
        statistics = {n: t[:, :, : window.longest] for n, t in window.statistics.items()}
        evicted = self._send_down(keys, values, window.positions(), statistics, due, window.lengths, prompt)
        window.take_out(ladder.n_sink, due)
        window.shrink(ladder.n_sink + ladder.recent_window + ladder.tile)
        self._report("encode", int(due.sum()) * window.keys.shape[1] - evicted, before, started)
        if evicted:
            self._report("evict", evicted, before, started, "fp16")

    def _rank_due(self) -> None:
        """Re-rank the rows that have taken ``plan.every`` tokens since they were last ranked."""
        due = self.since_ranking >= self.plan.every
        if bool(due.any()):
            self.rank(due)

    def rank(self, rows: Tensor | None = None) -> None:
        """Re-score every token and move what is over capacity down the ladder.

        Args:
            rows: bool ``[B]`` (CPU) of the rows that are ranked: rows that came at different times are not due together,
                and each must go on as it would alone. ``None`` for all.
        """
        rows = torch.ones_like(self.since_ranking, dtype=torch.bool) if rows is None else rows
        self.since_ranking = self.since_ranking.masked_fill(rows, 0)
        if not self.plan.ladder.bounded or not self.is_initialized:
            return
        started, before = time.perf_counter(), self.nbytes()
        moved, evicted = rank(self._contents(), rows)
        if moved:
            self._report("demote", moved, before, started)
        if evicted:
            self._report("evict", evicted, before, started, self.stores[-1].tier.name)
        self._report("reassign", moved + evicted, before, started)

    def assign(self, tiers: Tensor) -> None:
        """Move tokens to the tiers that somebody else chose (the manual loop).

        Args:
            tiers: int64 ``[B, H_kv, logical]``: wanted tier of each position: 0 full precision, ``i`` the ladder's
                ``i``-th packed tier, -1 evicted. Tokens only move down; sinks and window are free to leave.

        Raises:
            InputError: wrong shape, an unknown tier, or a token that would have to move up.
        """
        now = self.tier_map()
        started, before = time.perf_counter(), self.nbytes()
        counts = assign(self._contents(), tiers, now)
        self._look_for_gaps()
        for kind, moved in zip(("encode", "demote", "evict"), counts, strict=True):
            if moved:
                self._report(kind, moved, before, started)
        self._report("reassign", sum(counts), before, started)

    # --- introspection ---
    def tier_map(self) -> Tensor:
        """int64 ``[B, H_kv, logical]``: 0 full precision, ``i`` the ladder's ``i``-th tier, -1 nowhere."""
        self.settle()
        window = self._window()
        shape = (self.batch_size, window.keys.shape[1], self.logical + 1)
        where = torch.full(shape, -1, dtype=torch.long, device=self.device)
        for level, found in enumerate([window.positions(), *(s.positions() for s in self.stores)]):
            index = found.expand(-1, shape[1], -1)
            index = index.where(index >= 0, torch.full_like(index, self.logical))
            where.scatter_(2, index, level)
        return where[..., : self.logical]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the layer keeps, as "tier/kind"."""
        if self.window is None:
            return {}
        held = {f"fp16/{n}": t for n, t in self.window.tensors().items()}
        for store in self.stores:
            tiled = "tiles." if store.tier.name == "fp16" else ""  # beside the window, which is fp16 too
            held.update({f"{store.tier.name}/{tiled}{n}": t for n, t in store.tensors().items()})
            for side, quantizer in (("k", store.tier.keys), ("v", store.tier.values)):
                held.update({f"{store.tier.name}/{side}.state.{n}": t for n, t in quantizer.state_dict().items()})
        held["layer/padding"], held["layer/since_ranking"] = self.padding, self.since_ranking
        if self.queries is not None:
            held.update({f"layer/queries.{n}": t for n, t in self.queries.tensors().items()})
        if self.shifts is not None:
            held.update({f"layer/shifts.{n}": t for n, t in self.shifts.tensors().items()})
        if self.pending is not None:
            held["layer/pending.keys"], held["layer/pending.values"] = self.pending
        return held

    def nbytes(self) -> int:
        """Bytes of all tensors held, each storage once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.tensors().values()}
        return sum(storages.values())

    def dense_shape(self, side: str) -> tuple[int, int, int, int]:
        """Shape that a handle shows: the logical length, whatever is stored."""
        window = self._window()
        held = window.keys if side == "key" else window.values
        return (held.shape[0], held.shape[1], self.logical, held.shape[3])

    def shown_shape(self, side: str) -> tuple[int, int, int, int]:
        """Shape of a handle on "key" or "value"."""
        return self.dense_shape(side)

    def shown(self, side: str) -> Tensor:
        """What a handle decodes to."""
        return self.dense(side)

    def dense(self, side: str) -> Tensor:
        """Dequantised tokens at their logical positions; zeros where nothing is stored (padding).

        Raises:
            InputError: if tokens were evicted: zeros would then change the answer.
        """
        pending = self.pending
        total = int((self.lengths * self._window().keys.shape[1]).sum())
        stored: list[Window | TierStore] = [self._window(), *self.stores]
        have = int(self._window().lengths.sum()) * self._window().keys.shape[1] + sum(
            int(s.lengths.sum()) for s in self.stores
        )
        have += pending[0].shape[0] * pending[0].shape[1] * pending[0].shape[2] if pending is not None else 0
        if have < total:
            raise InputError(
                f"layer {self.index} has evicted {total - have} tokens, which stock attention cannot leave out; "
                "use FADE's attention (config attention = 'fade') or a ladder without eviction"
            )
        batch, heads, flat_end, dim = self.dense_shape(side)
        padded = torch.zeros((batch, heads, flat_end + 1, dim), dtype=self.dtype, device=self.device)
        for part in stored:
            if isinstance(part, TierStore):
                if not part.tiles:
                    continue
                quantizer, packed = (
                    (part.tier.keys, part.packed_keys()) if side == "key" else (part.tier.values, part.packed_values())
                )
                tokens = quantizer.decode(packed)
            else:
                tokens = part.live()[0 if side == "key" else 1]
            where = part.positions().expand(-1, heads, -1)
            where = where.where(where >= 0, torch.full_like(where, flat_end))
            padded.scatter_(2, where[..., None].expand_as(tokens), tokens)
        if pending is not None:
            chunk = pending[0 if side == "key" else 1]
            padded[:, :, flat_end - chunk.shape[2] : flat_end] = chunk
        return padded[:, :, :flat_end]

    # --- inside ---
    def _window(self) -> Window:
        if self.window is None:
            raise InputError(f"layer {self.index} is empty: it has not seen a token yet")
        return self.window

    def _contents(self) -> Contents:
        return Contents(self.plan, self._window(), self.stores, self.logical, self.lengths, self.queries)

    def _admitted(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens that this layer can take, buffers ready for them. Raises ``InputError``."""
        held = (self.window.keys, self.window.values) if self.window is not None else None
        check_tokens(self.index, keys, values, held)
        check_room(self.index, self.logical, keys.shape[2], self.max_length)
        keys, values = self.plan.finite(
            self.index, keys, values, self.logical, self.plan.on_nonfinite, at_once=bool(self._learners)
        )
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        return keys, values

    def _look_for_gaps(self) -> None:
        """Read the window's positions back, to say whether it is ``unbroken``."""
        window = self._window()
        slots, lengths = torch.arange(window.longest), window.lengths[:, None]
        behind = (slots >= self.plan.ladder.n_sink) & (slots < lengths)
        run = self.logical - lengths + slots
        self.unbroken = torch.equal(window.positions()[:, 0].cpu()[behind], run[behind])

    def _due(self, lengths: Tensor) -> Tensor:
        """Tokens that rows of ``lengths`` full-precision tokens send down, int64 ``[B]``, whole tiles."""
        ladder = self.plan.ladder
        return whole((lengths - ladder.n_sink - ladder.recent_window).clamp_min(0), ladder.tile)

    def _absorb(self, padding: Tensor | None, statistics: Mapping[str, Tensor]) -> None:
        """Merge the pending chunk with the window and send what does not fit down the ladder."""
        if self.pending is None:
            return
        started, before = time.perf_counter(), self.nbytes()
        keys, values = self.pending
        self.pending = None
        window, ladder = self._window(), self.plan.ladder
        chunk, start = keys.shape[2], self.logical - keys.shape[2]
        empty = window.lengths == 0
        dropped = torch.zeros_like(window.lengths) if padding is None else padding.clamp_max(chunk) * empty
        self.padding = self.padding + dropped
        positions = torch.arange(start, self.logical, device=self.device).expand(keys.shape[0], -1)
        observed = {
            n: statistics.get(n, keys.new_zeros(keys.shape[:3], dtype=torch.float32)) for n in window.statistics
        }
        lengths = window.lengths + chunk - dropped
        if window.longest or bool(dropped.any()):
            held_k, held_v = window.live()
            join = self._joiner(chunk, dropped)
            keys = join(held_k, keys)  # first: the chunk's own keys are free before the values are copied
            values = join(held_v, values)
            observed = {n: join(window.statistics[n][:, :, : window.longest], t) for n, t in observed.items()}
            positions = join(window.positions(), positions[:, None])[:, 0]
        held_back = REJECTABLE if self.record_past else 0
        due = self._due(lengths - held_back) if ladder.tiers and not self.holding else torch.zeros_like(lengths)
        evicted = 0
        if bool(due.any()):
            evicted = self._send_down(keys, values, positions[:, None], observed, due, lengths, True)
        self._keep_in_window(keys, values, positions, observed, lengths, due)
        encoded = int(due.sum()) * keys.shape[1] - evicted
        if encoded:
            self._report("encode", encoded, before, started)
        if evicted:
            self._report("evict", evicted, before, started, "fp16")
        if not self.holding:
            self._rank_due()

    def _joiner(self, chunk: int, dropped: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Makes window and chunk, ``dropped[b]`` columns of it left out, one left-aligned run of tokens a row."""
        window = self._window()
        held, own = window.longest, window.lengths[:, None]
        slots = torch.arange(held + chunk)
        at = sent((slots - own + dropped[:, None]).clamp(0, chunk - 1), self.device)
        old_here = sent(slots[:held] < own, self.device)

        def join(old: Tensor, new: Tensor) -> Tensor:
            wide = at[:, None, :, None] if new.dim() == 4 else at[:, None]
            both = new.gather(2, wide.expand(-1, new.shape[1], -1, *new.shape[3:]))
            if held:
                here = old_here[:, None, :, None] if new.dim() == 4 else old_here[:, None]
                both[:, :, :held] = torch.where(here, old, both[:, :, :held])
            return both

        return join

    def _send_down(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        observed: Mapping[str, Tensor],
        due: Tensor,
        held: Tensor,
        prompt: bool,
    ) -> int:
        """Encode tokens ``[n_sink, n_sink + due[b])`` of left-aligned rows of ``held[b]``; says how many were evicted.

        Those of a ``prompt`` are placed on all rungs at once, if nothing is there yet.
        """
        ladder = self.plan.ladder
        width, first = int(due.max()), ladder.n_sink
        part = slice(first, first + width)
        heads = keys.shape[1]
        moving = Tokens(
            keys[:, :, part],
            values[:, :, part],
            positions[:, :, part],
            due[:, None].expand(-1, heads).contiguous(),
            {n: t[:, :, part] for n, t in observed.items()},
            (self.logical - held + first)[:, None] if self.unbroken else None,
        )
        if prompt and ladder.bounded and not any(s.tiles for s in self.stores):
            return pour(self._contents(), moving, keys, values, positions, observed, due, held)
        self.stores[0].append(moving)
        if prompt:
            self.since_ranking = self.since_ranking.masked_fill(
                due > 0, self.plan.every
            )  # it can overflow a tier at once
        return 0

    def _keep_in_window(
        self,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        observed: Mapping[str, Tensor],
        lengths: Tensor,
        due: Tensor,
    ) -> None:
        window, ladder = self._window(), self.plan.ladder
        kept = lengths - due
        slots = torch.arange(int(kept.max()))
        source = torch.where(slots < ladder.n_sink, slots, slots + due[:, None]).clamp_max(keys.shape[2] - 1)
        source = sent(source, self.device)
        wide = source[:, None, :, None]
        new_k = keys.gather(2, wide.expand(-1, keys.shape[1], -1, keys.shape[3]))
        new_v = values.gather(2, wide.expand(-1, values.shape[1], -1, values.shape[3]))
        stats = {n: t.gather(2, source[:, None].expand(-1, t.shape[1], -1)) for n, t in observed.items()}
        window.assign(new_k, new_v, positions.gather(1, source), kept, stats)
        if ladder.tiers:
            window.shrink(ladder.n_sink + ladder.recent_window + ladder.tile)

    def _report(self, kind: str, tokens: int, before: int, started: float, tier: str = "") -> None:
        """Send an event; ``tier`` is where evicted tokens were."""
        for quantizer in self._learners:
            if quantizer.shortcoming:
                self._say_once({"op": "encode", "quantizer": quantizer.kind, "reason": quantizer.shortcoming})
        detail: dict[str, Any] = {"length": self.logical} | ({"from": tier} if tier else {})
        self.plan.emit(Event(kind, self.index, tokens, before, self.nbytes(), time.perf_counter() - started, detail))
