"""One layer of the cache: a full-precision window over a ladder of packed tiers."""

from __future__ import annotations

import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from fade_core.cache import inspection
from fade_core.cache.handle import CompiledHandle, Handle
from fade_core.cache.layer_plan import NEVER, REJECTABLE, LayerPlan
from fade_core.cache.prompt import keep_in_window, left_aligned
from fade_core.errors import InputError, NonFiniteError
from fade_core.eviction.assignment import assign
from fade_core.eviction.byte_budget import ByteBudget
from fade_core.eviction.ladder import whole
from fade_core.eviction.query_moments import QueryMoments
from fade_core.eviction.ranking import pour, rank
from fade_core.eviction.view import Contents
from fade_core.interfaces import Event, PromptView
from fade_core.ops.append import LOGICAL, MOST_TOKENS, NONFINITE, ODD_MASK
from fade_core.ops.step import LayerBuffers, TierBuffers, plan_step, read_all, step_buffers, step_name, take_in
from fade_core.storage.capacity import bucket
from fade_core.storage.repositioning import Shift, note_shifts, shown_shifts
from fade_core.storage.slots import TokenLayout
from fade_core.storage.tier_store import TierStore, Tokens
from fade_core.storage.window import Window
from fade_core.support.checks import check_room, check_tokens
from fade_core.support.transfer import sent


@dataclass(frozen=True)
class _Before:
    """Where a layer stood before the forward pass that is under way.

    Attributes:
        logical: tokens the model had seen.
        step: whether the pass took its tokens straight into the window: then only they are dropped again, since a tile
            that it encoded holds the same tokens.
        ranked_at: as the layer's.
        padding: as the layer's.
        unbroken: as the layer's.
        statistics: of the window's and the tiers' tokens, where a step has added to them.
        held: snapshots of the window and of each store, where the pass brings a prompt.
    """

    logical: int
    step: bool
    ranked_at: Tensor
    padding: Tensor
    unbroken: bool
    statistics: list[tuple[Tensor, Tensor]]
    held: tuple[tuple[dict[str, Tensor], Tensor], list[dict[str, Tensor]]] | None


class TieredLayer(CacheLayerMixin):
    """Keys and values of one attention layer, compressed as soon as attention has seen them exactly once.

    Outside, the layer has the *logical* length of everything the model has seen; inside, every stored token knows its
    position. Leading padding of a row is never stored. Up to ``MOST_TOKENS`` new tokens go straight into the window, by the
    op ``append``, which encodes the oldest tiles of a full one; longer input is a prompt, which attention sees exactly
    before it is packed. Everything else happens between passes, in ``maintain``.

    Args:
        plan: what the layer is made of.
        max_length: most tokens the layer may see, or ``None``; with it all buffers are allocated once.

    Attributes:
        owner: the cache, if its passes end with this layer's attention.
        unbroken: whether each row's window, its sinks aside, is a run of positions up to the newest: the host then knows
            them all. Only tokens that were moved by hand leave gaps.
        compiles: whether ``generate`` may compile steps.
        first: position of each row's first token, int64 ``[B]`` on the device, for compiled steps.
        counters: int64 ``[3]`` on the device (``fade_core.ops.append``).
        ranked_at: logical length at which each row was last ranked, int64 ``[B]`` on the CPU.
        slots: width of the masks of compiled steps.
        trusting: whether the mask of a compiled step is taken to hide padding alone, as the prompt's did.
        watches: whether this layer looks at the masks of steps for all layers.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, plan: LayerPlan, max_length: int | None = None) -> None:
        super().__init__()
        self.plan, self.index, self.max_length = plan, plan.index, max_length
        self.fixed = max_length is not None
        self.compiles, self.watches = self.fixed, False
        self.record_past = self.reading = self.holding = False
        self.owner: weakref.ref[Any] | None = None
        self.counters: Tensor
        self.first: Tensor
        self._refused: set[tuple[str, str]] = set()
        self._learners = [q for tier in plan.ladder.tiers for q in (tier.keys, tier.values) if q.learns]
        self._kept: tuple[Window, tuple[TierStore, ...]] | None = None
        self._blank()

    def _blank(self) -> None:
        """Hold nothing; buffers of fixed size stay where they are: compiled graphs know them."""
        self.is_initialized = self.ready = self.trusting = False
        self._window: Window | None = None
        self._stores: tuple[TierStore, ...] = ()
        self.queries: QueryMoments | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self.padding = torch.zeros(0, dtype=torch.long)
        self.ranked_at = torch.zeros(0, dtype=torch.long)
        self.unbroken = True
        self._before: _Before | None = None
        self._buffers: LayerBuffers | None = None
        self._appended: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._attended: tuple[list[Tensor], list[Tensor]] = ([], [])
        self._known = self._unseen = self._encoded = 0
        self._behind = self._stale = self._maintained = self._room_left = False
        self.slots = bucket(self.max_length or 1)
        if self._kept is not None:
            self._kept[0].clear()
            for store in self._kept[1]:
                store.clear()
            self.counters.zero_()
        else:
            self.counters, self.first = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long)

    def fresh(self) -> TieredLayer:
        """An empty layer of the same plan."""
        layer = TieredLayer(self.plan, self.max_length)
        layer.compiles, layer.watches = self.compiles, self.watches
        return layer

    # --- what is held; where the host's numbers are behind the device's, they are read back first ---
    @property
    def window(self) -> Window | None:
        """The full-precision tokens."""
        self.sync()
        return self._window

    @property
    def stores(self) -> tuple[TierStore, ...]:
        """The packed tokens, finest tier first."""
        self.sync()
        return self._stores

    @property
    def logical(self) -> int:
        """Tokens the model has seen."""
        if self._stale:
            self.sync()
        return self._known

    @logical.setter
    def logical(self, length: int) -> None:
        self._known, self._stale = length, False
        if self.is_initialized:
            self.counters[LOGICAL].fill_(length)  # an assignment would wait for the GPU

    @property
    def lengths(self) -> Tensor:
        """Real tokens each row has seen, int64 ``[B]`` on the CPU: the logical length less leading padding."""
        return self.logical - self.padding

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first token."""
        return self.padding.shape[0] if self.is_initialized else -1

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def sync(self) -> None:
        """Read back what steps have made of the host's numbers, if they are behind; tell what was encoded.

        Raises:
            InputError: if compiled steps went past ``max_cache_len``, were given a mask that hid stored tokens, or more of
                them came than tiles were reserved for.
            NonFiniteError: if compiled steps were given NaN or infinity.
        """
        if not self._behind or not self.is_initialized:
            return
        counters = self.counters.cpu().tolist()
        self._known, self._unseen = counters[LOGICAL], 0
        if self._window is not None:
            self._window.numbers.pull()
        for store in self._stores[:1]:
            store.table.used.pull()
        self._raise_step_errors(counters)  # again and again, until reset
        self._behind = self._stale = False
        used = sum(int(store.table.used.host.sum()) for store in self._stores[:1])
        if used > self._encoded:
            self._report("encode", (used - self._encoded) * self.plan.ladder.tile, self.nbytes(), time.perf_counter())
        self._encoded = used
        self._tell_refused()

    def _raise_step_errors(self, counters: list[int]) -> None:
        what, error = "", InputError
        if self.max_length is not None and counters[LOGICAL] > self.max_length:
            what = f"{counters[LOGICAL]} tokens were fed to a cache of max_cache_len={self.max_length}"
        elif self._window is not None and self._window.longest > self._window.capacity:
            what = (
                f"{self._window.longest} tokens were fed to a window of {self._window.capacity}: compiled steps went by and "
                "nothing made room; ask the cache for get_mask_sizes(1, 0) before each step, as generate does"
            )
        if counters[ODD_MASK]:
            what = f"{counters[ODD_MASK]} steps came with a mask that hides stored tokens, while the prompt's hid padding alone"
        if counters[NONFINITE]:
            error, what = NonFiniteError, "steps brought NaN or infinity"
        if what:
            raise error(f"layer {self.index}: {what}; compiled steps cannot refuse. Call reset() and start again")

    # --- what transformers asks ---
    @property
    def is_compileable(self) -> bool:
        """Whether the next step of one token may be compiled; drafts that may be rejected are kept eager."""
        return self.compiles and not (self.record_past or self.reading or self.holding)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch size, heads, dtype and device of the first tokens ``[B, H_kv, T, D]``."""
        batch, heads, _, key_dim = key_states.shape
        ladder = self.plan.ladder
        expected = (ladder.tiers[0].keys.head_dim, ladder.tiers[0].values.head_dim) if ladder.tiers else None
        if expected and expected != (key_dim, value_states.shape[-1]):
            raise InputError(
                f"layer {self.index}: keys and values have head_dim {key_dim} and {value_states.shape[-1]}; this cache was "
                f"built for {expected[0]} and {expected[1]}. Create the cache with the model that fills it."
            )
        if isinstance(ladder.budget, ByteBudget) and ladder.budget.shortfall(batch):
            raise InputError(f"layer {self.index}: {ladder.budget.shortfall(batch)}")
        self.dtype, self.device = key_states.dtype, key_states.device
        shapes = (batch, heads, key_dim), (batch, heads, value_states.shape[-1])
        if self._kept is None or not self._fits(self._kept[0], *shapes):
            self._allocate(*shapes)
        if self.plan.tracker.query_statistics and ladder.bounded:
            self.queries = QueryMoments("query_covariance" in self.plan.tracker.query_statistics)
        self.padding, self.ranked_at = torch.zeros(batch, dtype=torch.long), torch.zeros(batch, dtype=torch.long)
        if self._kept is not None:
            self._window, self._stores = self._kept
        self.is_initialized = True
        self.logical = 0
        self._plan_steps(fresh=bool(self._learners))
        if self.compiles and self.device.type != "cpu":
            self.warm_up()

    def _allocate(self, keys: tuple[int, int, int], values: tuple[int, int, int]) -> None:
        """An empty window and empty stores for tokens ``(B, H_kv, D)``; of fixed size if ``max_length`` is known."""
        plan, ladder, (batch, heads, key_dim) = self.plan, self.plan.ladder, keys
        statistics = plan.tracker.statistics if ladder.bounded else ()
        spare = 0 if isinstance(ladder.budget, ByteBudget) else max(REJECTABLE, MOST_TOKENS)
        slots = plan.threshold + spare if self.fixed else 0
        layout = TokenLayout(heads, self.dtype, self.device, statistics, plan.shifted)
        window = Window(batch, key_dim, values[2], slots, layout, floor=slots)
        room = plan.room(self.slots, max(1, batch)) if self.fixed else [0] * len(ladder.tiers)
        most = max(1, self.slots // ladder.tile) if self.fixed and plan.allocates else 0
        stores = tuple(
            TierStore(tier, batch, layout, plan.ranked, plan.codec, fixed, most)
            for tier, fixed in zip(ladder.tiers, room, strict=True)
        )
        self.counters = torch.zeros(3, dtype=torch.long, device=self.device)
        self.first = torch.zeros(batch, dtype=torch.long, device=self.device)
        self._buffers = None
        self._window, self._stores = window, stores
        self._kept = (window, stores) if self.fixed else None

    @torch.no_grad()
    def warm_up(self) -> None:
        """Run a step on empty buffers and undo it.

        What ops and quantizers make once and keep (compiled kernels, rotations on the device) is made here, outside the
        memory pool of a CUDA graph, where nothing may stay behind.
        """
        window = inspection.window_of(self)
        window.reserve(1)
        batch, heads, _, dim = window.keys.shape
        buffers = self.buffers
        take_in(
            self.step_plan,
            window.keys.new_zeros((batch, heads, 1, dim)),
            window.values[:, :, :1].clone(),
            step_buffers(buffers),
        )
        query = window.keys.new_zeros((batch, max(self.plan.query_heads, heads), 1, dim))
        read_all(self.step_plan, query, buffers, None, None, 1.0, None)
        self.counters.zero_()
        window.clear()

    def _fits(self, window: Window, keys: tuple[int, int, int], values: tuple[int, int, int]) -> bool:
        held = tuple((*t.shape[:2], t.shape[3]) for t in (window.keys, window.values))
        return held == (keys, values) and (window.keys.dtype, window.keys.device) == (self.dtype, self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the new tokens ``[B, H_kv, Q, D]`` and return what attention should read.

        Raises:
            InputError: wrong shape, dtype, device or batch size.
            NonFiniteError: NaN or infinity.
                Nothing has changed in this layer then; the cache takes back the layers before it.
        """
        if not torch.compiler.is_compiling():
            return self._update_eagerly(key_states, value_states)
        if self.steps(key_states.shape[2]):
            self._behind = self._stale = True
            torch.ops.fade.append(key_states, value_states, *self._appended, self.step_name)
            return CompiledHandle(self, True), CompiledHandle(self, True)
        self._update_eagerly(key_states, value_states)  # a prompt: the graph ends here and goes on after
        return CompiledHandle(self, False), CompiledHandle(self, False)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update_eagerly(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        queries = keys.shape[2] if keys.dim() == 4 else 0
        self.commit()
        if not self._maintained:
            self.maintain(queries)
        self._maintained = False
        keys, values = self._admitted(keys, values)
        first = self._known == 0
        if first and not self.reading:
            for quantizer in self._learners:
                quantizer.forget()
        if self.reading or first or queries > MOST_TOKENS or not self._all_rows_begun():
            self.begin(step=False)
            self.pending = (keys.detach(), values.detach())
            self.logical = self.logical + queries
            if self.plan.attention == "stock" and first:
                self.finish_pending()
                return keys, values
        else:
            self.begin(step=True)
            # tokens that may be taken back, or are to stay, leave the window to nobody; most steps find it not full anyway
            kept = self.record_past or self.holding or self._room_left
            take_in(self.step_plan, keys, values, step_buffers(self.buffers), self._rules[kept])
            self._tell_refused()
            self._known += queries
            self._behind = True
        return Handle(self, "key"), Handle(self, "value")

    def _all_rows_begun(self) -> bool:
        """Whether every row holds a token; what the host knows of it, since rows only lose their last one by hand."""
        if self._behind:
            return self.ready
        return self._window is not None and bool((self._window.numbers.host > 0).all())

    def steps(self, queries: int) -> bool:
        """Whether the next ``queries`` tokens are a step that a graph can hold."""
        return queries == 1 and self.ready and not (self.record_past or self.reading or self.holding)

    def get_seq_length(self) -> Any:
        """Logical length: tokens the model has seen, stored or not; a tensor inside a compiled graph."""
        if torch.compiler.is_compiling() and self.ready:
            return self.counters[LOGICAL]
        return self.logical if self.is_initialized else 0

    def query_offset(self) -> Any:
        """Logical length for masks: where the host does not know it, the device's own."""
        if self.is_initialized and (self._stale or (torch.compiler.is_compiling() and self.ready)):
            return self.counters[LOGICAL]
        return self.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks of steps that are compiled span all slots, those of other passes the logical length.

        Raises:
            InputError: if the tokens would pass ``max_length``. The model asks before its first layer runs, whose own
                state (a convolution's, say) could not be taken back.
        """
        stepping = self.is_compileable and self.steps(int(query_length))
        if not torch.compiler.is_compiling():
            self._check_room(int(query_length))
        if stepping:
            return self.slots, 0
        return self.logical + int(query_length), 0

    def _check_room(self, tokens: int) -> None:
        """Refuse tokens past ``max_length``, reading the device's length only where it may matter."""
        if self.max_length is not None and self._known + self._unseen + tokens > self.max_length:
            check_room(self.index, self.get_seq_length(), tokens, self.max_length)

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
            self.finish_pending()
            end = max(0, self.logical + tokens_to_remove)
            window, stores = inspection.window_of(self), self.stores
            window.crop(end)
            for store in stores:
                store.crop(end)
            self.ranked_at += end - self.logical  # what came since is counted, not where
            self.logical = end
            self.padding = self.padding.clamp_max(end)
            if not end:
                self._blank()
                return
            self.changed()
        self.compress_due()
        self._rank_due()

    def reset(self) -> None:
        """Forget everything; memory is freed, save for buffers of fixed size."""
        self.record_past = False
        self._blank()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row ``i`` becomes what row ``beam_idx[i]`` was (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows."""
        if not self.is_initialized:
            return
        self.finish_pending()
        self.commit()
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        inspection.window_of(self).select_rows(indices)
        for store in self.stores:
            store.select_rows(indices)
        if self.queries is not None:
            self.queries.select_rows(indices)
        self.padding, self.ranked_at = self.padding[indices.cpu()], self.ranked_at[indices.cpu()]
        self.changed()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times; packed tiles are shared between the copies."""
        if self.is_initialized:
            self.batch_select_indices(torch.arange(self.padding.shape[0]).repeat_interleave(repeats))

    # --- between passes ---
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def maintain(self, coming: int = 0) -> None:
        """Between two passes: rank what is due and make room for ``coming`` tokens. The only place where buffers move."""
        self._maintained = coming > 0
        if not self.is_initialized:
            return
        self.finish_pending()
        self.commit()
        if self.device.type == "cpu":
            self.sync()
        if self.record_past and not self.reading:
            self.compress_due()  # whatever the last verification rejected has been cropped by now
        if not self.reading:
            self._rank_due()
        self._reserve(coming)
        self._unseen += coming

    def _reserve(self, coming: int) -> None:
        """Room for ``coming`` tokens, in the window and behind it, as far as they may come straight into it."""
        window, stores, plan = self._window, self._stores[:1], self.plan
        kept = self.record_past or self.holding or not stores
        if window is not None and coming <= MOST_TOKENS and not self.reading:
            for unseen in (self._unseen, 0):
                held = window.longest + unseen  # at most: what the host has not seen yet may have left the window
                due = 0 if kept or held < plan.threshold else (held - plan.threshold) // plan.ladder.tile + 1
                slots = held - due * plan.ladder.tile + coming
                self._room_left = not due
                if slots <= window.capacity and (kept or stores[0].ahead() >= due):
                    break
                if unseen:
                    self.sync()
                    continue
                if due and not self.fixed:
                    self.compress_due()
                    self._room_left, slots = True, window.longest + coming
                elif due and stores[0].reserve(due, due):
                    self._buffers = None
                if slots > window.capacity:
                    packed = any(store.tiles for store in self._stores)
                    window.reserve(max(slots, plan.threshold - 1 + coming) if packed and not kept else slots)
                    self._buffers = None
        if not self.fixed and self._known + self._unseen + coming > self.slots:
            self.slots = bucket(self._known + self._unseen + coming)
        self._wire()

    def finish_pending(self, padding: Tensor | None = None, statistics: Mapping[str, Tensor] | None = None) -> None:
        """Take in what ``update`` left pending. Called right after attention.

        Args:
            padding: leading columns of the pending chunk that are padding, int64 ``[B]`` (CPU), for rows still empty.
            statistics: what attention observed of the pending tokens, float32 ``[B, H_kv, Q]`` a name.
        """
        if self.pending is not None and self.reading:
            self.logical -= self.pending[0].shape[2]
            self.pending = self._before = None
        elif self.pending is not None:
            self._place_prompt(padding, statistics or {})

    def settle(self) -> None:
        """Finish what is under way: what is pending is placed, what is due is packed and ranked."""
        self.finish_pending()
        self.commit()
        if self.is_initialized and not self.record_past:
            self.compress_due()
            self._rank_due()

    def rest(self) -> None:
        """The pass is over: what is due is packed and ranked at once, where the host need not wait for the device to know."""
        if self._behind and self.device.type != "cpu":
            self.commit()
        else:
            self.settle()
        if self.compiles and self.is_initialized:
            self._wire()  # a compiled step may come without anybody asking for the mask

    def replan(self) -> None:
        """Take the plan of the quantizers as they are now."""
        if self.is_initialized:
            self._plan_steps(fresh=bool(self._learners))

    def _plan_steps(self, fresh: bool) -> None:
        """Name the plan of the quantizers as they are now; ``fresh``: a name that no other has."""
        self.step_plan, self._buffers = plan_step(self.plan.step(), self.plan.meaning, fresh), None
        checked = replace(self.step_plan.rule, on_nonfinite="checked")
        self._rules = checked, replace(checked, threshold=NEVER)

    def compile_steps(self) -> None:
        """Let ``generate`` compile steps from here on."""
        self.compiles, self._buffers = True, None

    def restored(self) -> None:
        """A saved state has been put in, its quantizers' included: get ready to go on."""
        if self.is_initialized:
            self.replan()
            self._look_for_gaps()
            self.changed()
        self.settle()

    def release(self) -> None:
        """Everything that was held in full precision (``holding``) goes where it belongs, as a prompt would."""
        self.settle()
        self.holding = False
        if self.is_initialized:
            self.commit()
            self.compress_due(prompt=True)
            self._rank_due()

    def compress_due(self, prompt: bool = False) -> None:
        """Encode what has left the window; ``prompt``: it may be placed on any tier."""
        ladder = self.plan.ladder
        if not ladder.tiers or self.holding or not self.is_initialized:
            return
        window = inspection.window_of(self)
        if window.longest < self.plan.threshold:
            return
        due = self._due(window.lengths)
        started, before = time.perf_counter(), self.nbytes()
        keys, values = window.live()
        statistics = {n: t[:, :, : window.longest] for n, t in window.statistics.items()}
        evicted = self._send_down(keys, values, window.live_positions(), statistics, due, window.lengths, prompt)
        window.take_out(ladder.n_sink, due)
        window.shrink(0 if prompt else self.plan.threshold)
        self.changed()
        self._report_packed(int(due.sum()) * window.keys.shape[1], evicted, before, started)

    def _rank_due(self) -> None:
        """Rank the rows that have taken ``plan.every`` tokens since they were last ranked; not while a pass is open."""
        if not self.plan.ladder.bounded or self.holding or self._before is not None:
            return
        if self._known + self._unseen - int(self.ranked_at.min()) < self.plan.every:
            return
        due = self.logical - self.ranked_at >= self.plan.every
        if bool(due.any()):
            self.compress_due()
            self.rank(due)

    def rank(self, rows: Tensor | None = None) -> None:
        """Re-score every token and move what is over capacity down the ladder.

        Args:
            rows: bool ``[B]`` (CPU) of the rows that are ranked: rows that came at different times are not due together,
                and each must go on as it would alone. ``None`` for all.
        """
        if not self.is_initialized:
            return
        rows = torch.ones_like(self.ranked_at, dtype=torch.bool) if rows is None else rows
        self.ranked_at = self.ranked_at.masked_fill(rows, self.logical)
        if not self.plan.ladder.bounded:
            return
        started, before = time.perf_counter(), self.nbytes()
        moved, evicted = rank(self._contents(), rows)
        self.changed()
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
        self.changed()
        for kind, moved in zip(("encode", "demote", "evict"), counts, strict=True):
            if moved:
                self._report(kind, moved, before, started)
        self._report("reassign", sum(counts), before, started)

    # --- what attention asks ---
    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention ``[B, H_q, Q, D]`` of the tokens that ``update`` has just taken in."""
        shifts = None if mask is None else self.shown_shifts(mask)
        output = read_all(self.step_plan, query, self.buffers, mask, sinks, scaling, softcap, shifts)
        self._tell_refused()
        return output

    def attend_compiled(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """``attend`` inside a graph.

        On a CPU every mask is honoured. Elsewhere nothing may be read back: while the prompt's mask hid nothing but
        padding, a step's is taken to do the same, and the first layer counts the steps for which that was wrong.
        """
        first = None
        if self.trusting:
            mask, first = (mask, self.first) if self.watches else (None, None)
        asked = mask, sinks, scaling, softcap, self.step_name, first
        output: Tensor = torch.ops.fade.attend(query, *self._attended, *asked)
        return output

    def shown_shifts(self, mask: Tensor) -> list[Shift | None] | None:
        """Shifts under a mask ``[B or 1, 1, Q, logical]``; ``None`` if it hides nothing that is stored but padding."""
        if self.plan.rope is None or not self.plan.shifted:
            return None
        end = self.logical - (0 if self.pending is None else self.pending[0].shape[2])
        shown = mask[:, :, -1, :end].any(1)
        padded = torch.arange(end, device=mask.device) < sent(self.padding, mask.device)[:, None]
        if bool((shown | padded).all()):
            return None
        return shown_shifts(self.plan.rope, inspection.window_of(self), self.stores, end, shown)

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
        self._plan_steps(fresh=True)  # no graph of the codes before them

    def statistics(self) -> list[dict[str, Tensor]]:
        """Statistics of each part's tokens, stores that hold any first, then the window: views, updated in place."""
        window = inspection.window_of(self)
        found = [{n: t.flatten(2) for n, t in s.statistics.items()} for s in self.stores if s.tiles]
        if window.longest:
            found.append({n: t[:, :, : window.longest] for n, t in window.statistics.items()})
        return found

    # --- a pass ---
    def begin(self, step: bool) -> None:
        """Remember where the layer stands until ``commit``, so that ``rollback`` can return to it."""
        statistics: list[tuple[Tensor, Tensor]] = []
        held = None
        if self.is_initialized and self._known and not self.reading:
            if step and self.plan.tracker.statistics:
                statistics = [(t, t.clone()) for part in self.statistics() for t in part.values()]
            elif not step:
                held = inspection.window_of(self).snapshot(), [store.snapshot() for store in self.stores]
            if self.queries is not None:
                self.queries.begin()
        self._before = _Before(self._known, step, self.ranked_at, self.padding, self.unbroken, statistics, held)

    def commit(self) -> None:
        """The forward pass can no longer fail: what it replaced is freed."""
        before, self._before = self._before, None
        if before is None or self._window is None:
            return
        if self.queries is not None:
            self.queries.commit()

    def rollback(self) -> None:
        """Be again as before the forward pass that is under way; nothing happens if none is."""
        before, self._before = self._before, None
        if before is None:
            return
        if not before.logical:
            self._blank()
            return
        self.pending = None
        window = inspection.window_of(self)
        if before.step:
            window.drop_newest(self.logical - before.logical)
            for held, was in before.statistics:
                held.copy_(was)
        elif before.held is not None:
            window.assign(*before.held[0])
            for store, snapshot in zip(self.stores, before.held[1], strict=True):
                store.restore(snapshot)
        if self.queries is not None:
            self.queries.rollback()
        self.ranked_at, self.padding, self.unbroken = before.ranked_at, before.padding, before.unbroken
        self.logical = before.logical
        self.counters[NONFINITE].zero_()
        self.changed()

    # --- introspection ---
    def tier_map(self) -> Tensor:
        """int64 ``[B, H_kv, logical]``: 0 full precision, ``i`` the ladder's ``i``-th tier, -1 nowhere."""
        self.settle()
        return inspection.tier_map(self)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the layer keeps, as "tier/kind"."""
        return inspection.tensors(self)

    def nbytes(self) -> int:
        """Bytes of all tensors held, each storage once."""
        return inspection.nbytes(self)

    def dense(self, side: str) -> Tensor:
        """Dequantised tokens of "key" or "value" at their logical positions; ``InputError`` if any was evicted."""
        return inspection.dense(self, side)

    def _tell_refused(self) -> None:
        """Say, once a reason, which calls the reference computed in place of a kernel."""
        for op, kernel, reason in sorted(self.step_plan.refused):
            self.emit_once({"op": op, "kernel": kernel, "reason": reason})
        self.step_plan.refused.clear()

    def emit_once(self, detail: dict[str, str]) -> None:
        """Send a "fallback" event, once a layer, op and reason."""
        if (detail["op"], detail["reason"]) not in self._refused:
            self._refused.add((detail["op"], detail["reason"]))
            self.plan.emit(Event("fallback", self.index, detail=detail))

    # --- inside ---
    @property
    def buffers(self) -> LayerBuffers:
        """What a step reads and writes."""
        if self._buffers is None:
            self._wire()
        if self._buffers is None:
            raise InputError(f"layer {self.index} is empty: it has not seen a token yet")
        return self._buffers

    def changed(self) -> None:
        """The host has moved tokens: shifts are worked out anew, and steps find what there is now."""
        window, stores = self._window, self._stores
        if window is None:
            return
        if self.plan.shifted:
            note_shifts(window, stores, self.logical - (0 if self.pending is None else self.pending[0].shape[2]))
        self._encoded = sum(int(store.table.used.host.sum()) for store in stores[:1])
        self._appended = self._attended = ([], [])
        if len(self.first) != len(self.padding):
            self.first = sent(self.padding, self.device).clone()
        self.first.copy_(sent(self.padding, self.device))
        self.ready = bool((window.numbers.host > 0).all())
        self._buffers = None

    def _wire(self) -> None:
        """Lay out what a step hands to its ops, and promise the compiler that it stays there."""
        window = self._window
        if self._buffers is not None or window is None:
            return
        tiers, moves = (
            [],
            self.compiles and self.plan.ladder.bounded,
        )  # a graph is not told that tiles are in runs, and then not
        for store in self._stores:
            table = store.table
            numbers = table.ids.device, table.used.device, table.reserved.device, table.counts.device
            flags = store.runs and not moves, table.whole()
            tiers.append(TierBuffers(store.tier, store.pool.fields, *numbers, table.starts, table.notes, *flags))
        moments = {} if self.queries is None else self.queries.tensors()
        held = window.keys, window.values, window.positions, window.numbers.device, self.counters, window.notes
        self._buffers = LayerBuffers(*held, tuple(tiers), moments)
        if not self.compiles:
            return
        self._appended, self._attended = self._buffers.appended(), self._buffers.attended()
        self.step_name = step_name(self.step_plan, self._buffers)
        for tensor in (*self._appended[0], *self._appended[1], *self._attended[0], *self._attended[1], self.first):
            # unguarded: another cache of the same shapes runs the same graph, and CUDA graphs are recorded anew
            torch._dynamo.mark_static_address(tensor, guard=False)

    def _contents(self) -> Contents:
        return Contents(self.plan, inspection.window_of(self), self.stores, self.logical, self.lengths, self.queries)

    def _admitted(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens that this layer can take, buffers ready for them. Raises ``InputError``."""
        held = (self._window.keys, self._window.values) if self._window is not None else None
        check_tokens(self.index, keys, values, held)
        self._check_room(keys.shape[2])
        keys, values = self.plan.finite(
            self.index, keys, values, self._known, self.plan.on_nonfinite, at_once=bool(self._learners)
        )
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        return keys, values

    def _look_for_gaps(self) -> None:
        """Read the window's positions back, to say whether it is ``unbroken``."""
        window = inspection.window_of(self)
        slots, lengths = torch.arange(window.longest), window.lengths[:, None]
        behind = (slots >= self.plan.ladder.n_sink) & (slots < lengths)
        run = self.logical - lengths + slots
        self.unbroken = torch.equal(window.live_positions()[:, 0].cpu()[behind], run[behind])

    def _due(self, lengths: Tensor) -> Tensor:
        """Tokens that rows of ``lengths`` full-precision tokens send down, int64 ``[B]``, whole tiles."""
        ladder = self.plan.ladder
        return whole((lengths - ladder.n_sink - ladder.recent_window).clamp_min(0), ladder.tile)

    def _place_prompt(self, padding: Tensor | None, statistics: Mapping[str, Tensor]) -> None:
        """Merge the pending chunk with the window and send what does not fit down the ladder."""
        if self.pending is None:
            return
        started, before = time.perf_counter(), self.nbytes()
        chunk, self.pending = [*self.pending], None
        window, ladder = inspection.window_of(self), self.plan.ladder
        self.ranked_at = self.ranked_at + chunk[0].shape[2]
        keys, values, positions, observed, lengths, dropped = left_aligned(
            window, chunk, self.logical, padding, statistics
        )
        self.padding = self.padding + dropped
        held_back = REJECTABLE if self.record_past else 0
        due = self._due(lengths - held_back) if ladder.tiers and not self.holding else torch.zeros_like(lengths)
        evicted = 0
        if bool(due.any()):
            evicted = self._send_down(keys, values, positions[:, None], observed, due, lengths, True)
        keep_in_window(window, keys, values, positions, observed, lengths, due, ladder.n_sink)
        if ladder.tiers and not self.holding:
            window.shrink(0)
        self.changed()
        self._report_packed(int(due.sum()) * keys.shape[1], evicted, before, started)

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

        Those of a ``prompt`` are placed on all tiers at once, if nothing is there yet.
        """
        ladder = self.plan.ladder
        width, first = int(due.max()), ladder.n_sink
        part, heads = slice(first, first + width), keys.shape[1]
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
        if prompt:  # it can overflow a tier at once
            self.ranked_at = self.ranked_at.where(due == 0, self.logical - self.plan.every)
        return 0

    def _report_packed(self, due: int, evicted: int, before: int, started: float) -> None:
        if due > evicted:
            self._report("encode", due - evicted, before, started)
        if evicted:
            self._report("evict", evicted, before, started, "fp16")

    def _report(self, kind: str, tokens: int, before: int, started: float, tier: str = "") -> None:
        """Send an event; ``tier`` is where evicted tokens were."""
        for quantizer in self._learners:
            if quantizer.shortcoming:
                self.emit_once({"op": "encode", "quantizer": quantizer.kind, "reason": quantizer.shortcoming})
        detail: dict[str, Any] = {"length": self.logical} | ({"from": tier} if tier else {})
        self.plan.emit(Event(kind, self.index, tokens, before, self.nbytes(), time.perf_counter() - started, detail))
