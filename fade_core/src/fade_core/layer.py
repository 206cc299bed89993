"""One layer of the cache: a full-precision window over a ladder of packed tiers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fade_core.bytebudget import ByteBudget
from fade_core.codec import Codec
from fade_core.errors import InputError
from fade_core.handle import Handle
from fade_core.incoming import FiniteCheck, check_room, check_tokens
from fade_core.interfaces import Event, EvictionPolicy, Kernel, LayerView, PromptView, RopeScheme
from fade_core.kernels.attention import (
    READ_AT_ONCE,
    FullSegment,
    PackedSegment,
    Segment,
    TorchAttentionMass,
    TorchDecodeAttention,
)
from fade_core.ladder import Ladder, in_tiles, lowest, whole
from fade_core.querymoments import QueryMoments
from fade_core.shifts import Shift, Shifts
from fade_core.tierstore import TierStore, Tokens
from fade_core.tracker import AttentionTracker
from fade_core.transfer import sent
from fade_core.window import Window

DIRECT_QUERIES = 32
"""Steps of at most this many tokens go straight into the window; longer ones are chunks of a prompt."""

REJECTABLE = 64
"""Newest tokens of a chunk that stay in full precision until ``crop`` while past states are recorded."""


@dataclass
class LayerPlan:
    """What a layer is made of; built once by the cache.

    Attributes:
        index: layer index.
        num_layers: layers of the model.
        ladder: tiers, capacities, budget, sinks and window.
        policy: ranks tokens when something is bounded.
        every: decode steps between two rankings.
        tracker: attention statistics, shared by all layers.
        attention: "fade" if FADE's attention function drives the layer, "stock" if any other does.
        on_nonfinite: "raise" or "zero".
        kernel: implementation of ``decode_attention``.
        mass_kernel: implementation of ``attention_mass``, for kernels that give no probabilities.
        codec: how prompts are packed and tiers unpacked.
        emit: where events go.
        on_failure: called with the layer's index and length when it refuses input in the middle of a forward pass; says
            what became of the cache.
        rope: rotary embedding by which survivors of an eviction are read at contiguous positions; ``None`` where they keep
            theirs, or carry none.
        finite: refuses what is not finite; shared by the layers of a cache.
    """

    index: int
    num_layers: int
    ladder: Ladder
    policy: EvictionPolicy
    every: int = 64
    tracker: AttentionTracker = field(default_factory=lambda: AttentionTracker(()))
    attention: str = "fade"
    on_nonfinite: str = "raise"
    kernel: Kernel = field(default_factory=TorchDecodeAttention)
    mass_kernel: Kernel = field(default_factory=TorchAttentionMass)
    codec: Codec = field(default_factory=Codec)
    emit: Callable[[Event], None] = lambda event: None
    on_failure: Callable[[int, int], str] = lambda index, length: ""
    rope: RopeScheme | None = None
    finite: FiniteCheck = field(default_factory=FiniteCheck)

    @property
    def allocates(self) -> bool:
        """Whether the policy gives heads budgets of their own."""
        return self.ladder.budget is not None and type(self.policy).allocate is not EvictionPolicy.allocate


@dataclass(frozen=True)
class _Before:
    """Where a layer stood before the forward pass that is under way."""

    logical: int
    since_ranking: Tensor
    padding: Tensor


class TieredLayer(CacheLayerMixin):
    """Keys and values of one attention layer, compressed as soon as attention has seen them exactly once.

    Outside, the layer has the *logical* length of everything the model has seen; inside, every stored token knows its
    position. Leading padding of a row is never stored.

    Args:
        plan: what the layer is made of.
        max_length: most tokens the layer may see, or ``None``.
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
        self._before = _Before(self.logical, self.since_ranking, self.padding)
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
        ladder = self.plan.ladder
        if not ladder.bounded or not self.is_initialized:
            return
        started, before = time.perf_counter(), self.nbytes()
        window = self._window()
        scores, room = self._rooms()
        above = torch.zeros((self.batch_size, window.keys.shape[1]), dtype=torch.long)
        moved = evicted = 0
        for i, store in enumerate(self.stores):
            over = ladder.overflow(store.lengths, i, above, self.lengths, window.lengths, room) * rows[:, None]
            if bool(over.any()):
                if scores is None:
                    scores = self._scores()[0]
                last, held = i + 1 == len(self.stores), store.lengths
                tokens = store.split(self._choose(store, scores[i], over), decode=not last)
                gone = int((held - store.lengths).sum())
                if tokens is not None:
                    self.stores[i + 1].append(tokens)
                    moved += gone
                    scores = None  # the lower tier has other slots now
                else:
                    evicted += gone
            above = above + store.lengths
        if moved:
            self._report("demote", moved, before, started)
        if evicted:
            self._report("evict", evicted, before, started, self.stores[-1].tier.name)
        self._report("reassign", moved + evicted, before, started)

    def _rooms(self) -> tuple[list[Tensor] | None, Tensor | None]:
        """Packed tokens that each head may keep, ``[B, H_kv]``, with the tiers' scores if the policy was asked for it.

        ``None`` for the same in every head.
        """
        ladder, held = self.plan.ladder, sum(store.lengths for store in self.stores)
        if not self.plan.allocates or not isinstance(held, Tensor):
            return None, None
        budget = ladder.packed_budget(self.lengths, self._window().lengths)
        if bool((held.sum(1) <= budget * held.shape[1]).all()):
            return None, held
        scores, view = self._scores()
        kept = [part.masked_fill(s.positions() < 0, -torch.inf) for part, s in zip(scores, self.stores, strict=True)]
        always = view.positions.shape[2] - sum(part.shape[2] for part in kept)
        competing = torch.cat([kept[0].new_full((*held.shape, always), -torch.inf), *kept], 2)
        return scores, self._allocated(view, competing, budget, held)

    def _allocated(self, view: LayerView, competing: Tensor, budget: Tensor, held: Tensor) -> Tensor:
        """What the policy lets each head keep of the packed tokens ``held`` ``[B, H_kv]``, in whole tiles.

        Rows that are within the budget keep all, whatever their heads would be given: it would be given up for nothing.
        """
        policy, even = self.plan.policy, budget[:, None].expand_as(held)
        found = policy.allocate(view, competing, sent(budget, self.device))
        wanted = even if found is None else found.cpu()
        if wanted.shape != held.shape or wanted.is_floating_point() or bool((wanted < 0).any()):
            raise InputError(
                f"policy {policy.kind!r} allocated {wanted.dtype} {tuple(wanted.shape)} in layer {self.index}; int64 "
                f"[B, H_kv] = {tuple(held.shape)}, none of it negative, is needed"
            )
        if bool((wanted.sum(1) > even.sum(1)).any()):
            raise InputError(
                f"policy {policy.kind!r} allocated {int(wanted.sum(1).max())} tokens to the heads of a row in layer "
                f"{self.index}; the budget is {int(even.sum(1).min())}"
            )
        within = held.sum(1, True) <= even.sum(1, True)
        return torch.where(within, held, in_tiles(wanted, held, self.plan.ladder.tile))

    def assign(self, tiers: Tensor) -> None:
        """Move tokens to the tiers that somebody else chose (the manual loop).

        Args:
            tiers: int64 ``[B, H_kv, logical]``: wanted tier of each position: 0 full precision, ``i`` the ladder's
                ``i``-th packed tier, -1 evicted. Tokens only move down; sinks and window are free to leave.

        Raises:
            InputError: wrong shape, an unknown tier, or a token that would have to move up.
        """
        self.settle()
        wanted = self._wanted(tiers)
        leaving = self._leaving_window(wanted)
        self._check_tiles(wanted)
        started, before = time.perf_counter(), self.nbytes()
        encoded = dropped = 0
        if leaving is not None:
            self._window().assign(*leaving.stay())
            encoded = sum(self._take_in(store, leaving.of(level)) for level, store in enumerate(self.stores, start=1))
            dropped = int((leaving.target > len(self.stores)).sum())
        demoted, evicted = self._move_down(wanted)
        for kind, moved in (("encode", encoded), ("demote", demoted), ("evict", evicted + dropped)):
            if moved:
                self._report(kind, moved, before, started)
        self._report("reassign", encoded + demoted + evicted + dropped, before, started)

    def _wanted(self, tiers: Tensor) -> Tensor:
        """``tiers`` on this device with the evicted last, ``len(stores) + 1``. Raises ``InputError``."""
        shape = (self.batch_size, self._window().keys.shape[1], self.logical)
        if tuple(tiers.shape) != shape:
            raise InputError(
                f"layer {self.index}: tiers have shape {tuple(tiers.shape)}; [B, H_kv, T] = {shape} is needed"
            )
        if bool((tiers < -1).any()) or bool((tiers > len(self.stores)).any()):
            raise InputError(
                f"layer {self.index}: tiers must be -1 (evicted), 0 (full precision) or 1..{len(self.stores)} "
                f"({', '.join(s.tier.name for s in self.stores)}); found {int(tiers.min())}..{int(tiers.max())}"
            )
        now, wanted = (t.masked_fill(t < 0, len(self.stores) + 1) for t in (self.tier_map(), tiers.to(self.device)))
        if bool((wanted < now).any()):
            raise InputError(
                f"layer {self.index}: {int((wanted < now).sum())} tokens were asked back up the ladder; "
                "what was dropped cannot be restored, tokens only move down"
            )
        return wanted

    def _move_down(self, wanted: Tensor) -> tuple[int, int]:
        """Move packed tokens to the tiers they are ``wanted`` in; counts of demoted and evicted ones."""
        demoted = evicted = 0
        for level, store in enumerate(self.stores, start=1):
            for lower in range(level + 1, len(self.stores) + 2):
                positions = store.positions()
                moving = (wanted.gather(2, positions.clamp_min(0)) == lower) & (positions >= 0)
                if not bool(moving.any()):
                    continue
                if lower > len(self.stores):
                    store.split(moving, decode=False)
                    evicted += int(moving.sum())
                else:
                    demoted += self._take_in(self.stores[lower - 1], store.split(moving))
        return demoted, evicted

    @staticmethod
    def _take_in(store: TierStore, tokens: Tokens | None) -> int:
        """Append what there is; says how many tokens."""
        if tokens is None:
            return 0
        store.append(tokens)
        return int(tokens.counts.sum())

    def _check_tiles(self, wanted: Tensor) -> None:
        """Refuse to part tokens that share scales. Raises ``InputError``."""
        for store in self.stores:
            if not store.tiles or (store.tier.keys.moves_tokens and store.tier.values.moves_tokens):
                continue
            positions = store.positions().unflatten(-1, (-1, store.tile))
            target = wanted.gather(2, positions.flatten(2).clamp_min(0)).view(positions.shape)
            apart = ((target != target[..., :1]) & (positions >= 0)).any(-1)
            if bool(apart.any()):
                tile = positions[apart][0]
                raise InputError(
                    f"layer {self.index}: tier {store.tier.name!r} shares scales between the tokens of a tile, so that they "
                    f"move together; those at positions {int(tile[0])} to {int(tile.max())} were sent to different tiers. "
                    "Send whole tiles, or use quantizers with axis = 'token'."
                )

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
        )
        if prompt and ladder.bounded and not any(s.tiles for s in self.stores):
            return self._pour(moving, keys, values, positions, observed, due, held)
        self.stores[0].append(moving)
        if prompt:
            self.since_ranking = self.since_ranking.masked_fill(
                due > 0, self.plan.every
            )  # it can overflow a tier at once
        return 0

    def _pour(
        self,
        moving: Tokens,
        keys: Tensor,
        values: Tensor,
        positions: Tensor,
        observed: Mapping[str, Tensor],
        due: Tensor,
        held: Tensor,
    ) -> int:
        """Place the prompt's tokens directly: the best into the first tier, the next into the second, and so on.

        Returns:
            tokens that found no place, summed over rows and heads.
        """
        ladder, policy = self.plan.ladder, self.plan.policy
        lengths, window = self.lengths, held - due
        heads, width = keys.shape[1], moving.keys.shape[2]
        slots = torch.arange(width, device=self.device)
        live = (slots < sent(due[:, None], self.device))[:, None].expand(-1, heads, -1)
        available, room = moving.counts, None
        if policy.positional:
            scores = slots.float().expand_as(live)
        else:
            total = torch.arange(keys.shape[2], device=self.device)
            real = (total < sent(held[:, None], self.device))[:, None]
            where = positions.expand(-1, heads, -1).masked_fill(~real, -1)
            view = LayerView(
                where,
                self.logical,
                self.index,
                self.plan.num_layers,
                dict(observed),
                keys.float,
                values.float,
                lengths,
                self._query_statistics(),
            )
            every = self._checked(policy.score(view), where.shape)
            scores = every[:, :, ladder.n_sink : ladder.n_sink + width]
            if self.plan.allocates:
                competing = torch.full_like(every, -torch.inf)
                competing[:, :, ladder.n_sink : ladder.n_sink + width] = scores.masked_fill(~live, -torch.inf)
                room = self._allocated(view, competing, ladder.packed_budget(lengths, window), available)
        takes = ladder.fill(available if room is not None else due, lengths, window, room)
        rank = torch.argsort(
            torch.argsort(scores.masked_fill(~live, -torch.inf), dim=-1, descending=True, stable=True), dim=-1
        )
        upper = torch.zeros_like(available)
        for store, taken in zip(self.stores, takes, strict=True):
            take = taken if taken.dim() == 2 else taken[:, None].expand(-1, heads)
            lower, upper = upper, upper + take
            if not bool(take.any()):
                continue
            bounds = sent(lower, self.device)[..., None], sent(upper, self.device)[..., None]
            chosen = (rank >= bounds[0]) & (rank < bounds[1]) & live
            index = torch.argsort(~chosen, dim=-1, stable=True)[..., : int(take.max())]
            store.append(replace(moving, counts=take.contiguous()), index)
        return int((available - upper).sum())

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

    def _scores(self) -> tuple[list[Tensor], LayerView]:
        """The policy's scores of every tier's slots, ``[B, H_kv, tiles * tile]`` each, and what it saw."""
        window = self._window()
        heads = window.keys.shape[1]
        parts = [window.positions().expand(-1, heads, -1), *(s.positions().expand(-1, heads, -1) for s in self.stores)]
        sizes = [p.shape[2] for p in parts]
        statistics = {
            n: torch.cat(
                [window.statistics[n][:, :, : window.longest], *(s.statistics[n].flatten(2) for s in self.stores)], 2
            )
            for n in window.statistics
        }

        def decoded(side: int) -> Tensor:
            return torch.cat([window.live()[side], *(s.decoded()[side] for s in self.stores if s.tiles)], 2).float()

        view = LayerView(
            torch.cat(parts, 2),
            self.logical,
            self.index,
            self.plan.num_layers,
            statistics,
            lambda: decoded(0),
            lambda: decoded(1),
            self.lengths,
            self._query_statistics(),
        )
        scores = self._checked(self.plan.policy.score(view), view.positions.shape)
        return list(scores.split(sizes, dim=2)[1:]), view

    def _query_statistics(self) -> dict[str, Tensor]:
        return {} if self.queries is None else self.queries.statistics()

    def _checked(self, scores: Tensor, shape: torch.Size) -> Tensor:
        if scores.shape != shape:
            raise InputError(
                f"policy {self.plan.policy.kind!r} scored layer {self.index} with shape {tuple(scores.shape)}; "
                f"[B, H_kv, T] = {tuple(shape)} is needed"
            )
        return scores.float().nan_to_num(nan=-torch.inf)

    def _choose(self, store: TierStore, scores: Tensor, over: Tensor) -> Tensor:
        """Which slots of ``store`` go: the lowest tokens, or whole tiles by their mean where tokens cannot be parted."""
        positions = store.positions()
        live = positions >= 0
        if store.explicit and store.tier.keys.moves_tokens and store.tier.values.moves_tokens:
            return lowest(scores, live, over)
        tiled = scores.masked_fill(~live, 0).unflatten(-1, (-1, store.tile)).sum(-1)
        count = live.unflatten(-1, (-1, store.tile)).sum(-1)
        tiles = lowest(tiled / count.clamp_min(1), count > 0, -(-over // store.tile))
        return tiles.repeat_interleave(store.tile, dim=-1) & live

    def _leaving_window(self, wanted: Tensor) -> _Leaving | None:
        """Tokens that a manual assignment takes out of the window; all heads of a row must agree on them."""
        window = self._window()
        where = window.positions()
        target = wanted.gather(2, where.clamp_min(0).expand(-1, wanted.shape[1], -1))
        leaving = (target > 0) & (where >= 0)
        if not bool(leaving.any()):
            return None
        if not bool((leaving == leaving[:, :1]).all()):
            raise InputError(f"layer {self.index}: the heads of a row disagree on which tokens leave full precision")
        keys, values = window.live()
        stats = {n: t[:, :, : window.longest] for n, t in window.statistics.items()}
        return _Leaving(keys, values, where, stats, target.masked_fill(~leaving, 0))

    def _report(self, kind: str, tokens: int, before: int, started: float, tier: str = "") -> None:
        """Send an event; ``tier`` is where evicted tokens were."""
        for quantizer in self._learners:
            if quantizer.shortcoming:
                self._say_once({"op": "encode", "quantizer": quantizer.kind, "reason": quantizer.shortcoming})
        detail: dict[str, Any] = {"length": self.logical} | ({"from": tier} if tier else {})
        self.plan.emit(Event(kind, self.index, tokens, before, self.nbytes(), time.perf_counter() - started, detail))


@dataclass
class _Leaving:
    """Tokens on their way out of the window, with the tier each is bound for (0: it stays)."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    statistics: dict[str, Tensor]
    target: Tensor

    def stay(self) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """What ``Window.assign`` takes to hold the tokens that stay."""
        where = self.positions[:, 0]
        stays = (where >= 0) & (self.target[:, 0] == 0)
        index = torch.argsort(~stays, dim=-1, stable=True)
        wide = index[:, None, :, None]
        return (
            self.keys.gather(2, wide.expand_as(self.keys)),
            self.values.gather(2, wide.expand_as(self.values)),
            where.gather(1, index),
            stays.sum(-1).cpu(),
            {n: t.gather(2, index[:, None].expand_as(t)) for n, t in self.statistics.items()},
        )

    def of(self, level: int) -> Tokens | None:
        """The tokens bound for tier ``level``."""
        chosen = self.target == level
        counts = chosen.sum(-1).cpu()
        if not bool(counts.any()):
            return None
        index = torch.argsort(~chosen, dim=-1, stable=True)[..., : int(counts.max())]
        every = Tokens(self.keys, self.values, self.positions, counts, self.statistics)
        return _gather(every, index, counts)


def _gather(tokens: Tokens, index: Tensor, counts: Tensor) -> Tokens:
    """The tokens ``index`` (int64 ``[B, H_kv, K]``) of each row and head."""
    wide = index[..., None]
    return Tokens(
        tokens.keys.gather(2, wide.expand(-1, -1, -1, tokens.keys.shape[-1])),
        tokens.values.gather(2, wide.expand(-1, -1, -1, tokens.values.shape[-1])),
        tokens.positions.expand(-1, index.shape[1], -1).gather(2, index),
        counts,
        {n: t.gather(2, index) for n, t in tokens.statistics.items()},
    )
