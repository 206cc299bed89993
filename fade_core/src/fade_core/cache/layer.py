"""One layer of the cache: a full-precision window over a ladder of packed tiers."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers.cache_utils import CacheLayerMixin

from fade_core.cache.inspection import dense, tensors
from fade_core.cache.layer_plan import REJECTABLE, LayerPlan
from fade_core.cache.layer_steps import LayerSteps, bucket
from fade_core.cache.prompt import compress_due, place_prompt
from fade_core.errors import FadeError, InputError
from fade_core.eviction.byte_budget import ByteBudget
from fade_core.eviction.contents import LayerContents
from fade_core.eviction.query_moments import QueryMoments
from fade_core.eviction.ranking import rank
from fade_core.interfaces import Event
from fade_core.ops.buffers import LOGICAL, MOST_TOKENS, NONFINITE, LayerBuffers
from fade_core.ops.step import take_in
from fade_core.storage.repositioning import note_shifts
from fade_core.storage.tier_store import TierStore
from fade_core.support.checks import check_room, check_tokens
from fade_core.support.memory import storage_bytes
from fade_core.support.recording import recorded

AHEAD = 16
"""Where steps are compiled and buffers grow, a sixteenth of the tiles, four at least, is reserved ahead: growth costs time."""


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
        steps: how decode steps run.
        pending: keys and values ``[B, H_kv, Q, D]`` that attention has still to see exactly.
        record_past: newest tokens may be taken back, so that they stay in full precision until ``crop``.
        holding: everything stays in full precision.
        reading: passes leave nothing behind.
        owner: the cache.
        torn: what was being done to what is held, if it was not finished: nothing of it can be relied on.
    """

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, plan: LayerPlan, max_length: int | None = None) -> None:
        super().__init__()
        self.plan, self.index, self.max_length = plan, plan.index, max_length
        self.steps = LayerSteps(plan, max_length)
        self.record_past = self.reading = self.holding = False
        self.owner: weakref.ref[Any] | None = None
        self._kept: tuple[Any, ...] = ()  # the window and stores of fixed size
        self.reset()

    def reset(self) -> None:
        """Forget everything; memory is freed, save for buffers of fixed size, which stay where they are."""
        self.is_initialized = False
        self._held: LayerContents | None = None
        self.pending: tuple[Tensor, Tensor] | None = None
        self._before: tuple[int, Callable[[], None]] | None = None
        self._encoded = 0
        self._maintained = False
        self.torn = ""
        for part in self._kept:
            part.clear()
        self.steps.forget()

    # --- what is held ---
    @property
    def known(self) -> LayerContents:
        """The tokens as far as the host knows; nothing is read back. Raises ``InputError`` if there is none yet."""
        if self._held is None:
            raise InputError(f"layer {self.index} is empty: it has not seen a token yet")
        return self._held

    @property
    def held(self) -> LayerContents:
        """The tokens, with the numbers that steps have changed read back. Raises ``InputError`` if there is none yet."""
        self.sync()
        return self.known

    @property
    def logical(self) -> int:
        """Tokens the model has seen."""
        if self.steps.stale:
            self.sync()
        return 0 if self._held is None else self._held.logical

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def sync(self) -> None:
        """Read back what steps have changed, if the host is behind; tell what was encoded. Raises as ``read_back``."""
        if self._held is None:
            return
        if self.steps.behind:
            self.steps.read_back(self._held)
        elif self.device.type != "cpu":
            return
        self.tell_steps()

    def tell_steps(self) -> None:
        """Tell what steps have encoded, as far as it has been read back."""
        if self._held is None:
            return
        encoded, self._encoded = self._held.encoded - self._encoded, self._held.encoded
        if encoded > 0:
            _tell(self, {"encode": encoded}, self.held_bytes(), time.perf_counter())
        self.steps.tell_refused()

    @property
    def stores(self) -> tuple[TierStore, ...]:
        """What each tier holds, none before the first token."""
        return () if self._held is None else self.held.stores

    def tier_map(self) -> Tensor:
        """The tier of every position, int64 ``[B, H_kv, T]``; see ``LayerContents.tier_map``."""
        return self.held.tier_map()

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the layer keeps, as "tier/kind"."""
        if self._held is None:
            return {}
        found = tensors(self.held) | {"layer/counters": self.steps.counters, "layer/first": self.steps.first}
        if self.pending is not None:
            found["layer/pending.keys"], found["layer/pending.values"] = self.pending
        return found

    # --- what transformers asks ---
    @property
    def is_compileable(self) -> bool:
        """Whether the next step of one token may be compiled; drafts that may be rejected are kept eager."""
        return self.steps.compiles and not (self.record_past or self.reading or self.holding)

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first token."""
        return -1 if self._held is None else self._held.rows

    @property
    def keys(self) -> Tensor | None:
        """The keys of all tokens, as a ``Handle``, for models that look into a cache; ``None`` before the first token."""
        return None if self._held is None else Handle(self, "key", self._held.window.keys)

    @keys.setter
    def keys(self, tokens: Tensor | None) -> None:
        self._not_replaced(tokens)

    @property
    def values(self) -> Tensor | None:
        """Likewise the values."""
        return None if self._held is None else Handle(self, "value", self._held.window.values)

    @values.setter
    def values(self, tokens: Tensor | None) -> None:
        self._not_replaced(tokens)

    def _not_replaced(self, tokens: Tensor | None) -> None:
        if tokens is not None:
            raise InputError(
                f"layer {self.index} holds its tokens in tiers, where nobody else puts them (offloading, say); they come "
                "through update alone"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the batch size, heads, dtype and device of the first tokens ``[B, H_kv, T, D]``."""
        plan, ladder, rows = self.plan, self.plan.ladder, len(key_states)
        found = (key_states.shape[3], value_states.shape[3])
        expected = next(((tier.keys.head_dim, tier.values.head_dim) for tier in ladder.tiers), found)
        if expected != found:
            raise InputError(
                f"layer {self.index}: keys and values have head_dim {found[0]} and {found[1]}; this cache was "
                f"built for {expected[0]} and {expected[1]}. Create the cache with the model that fills it."
            )
        if isinstance(ladder.budget, ByteBudget) and ladder.budget.shortfall(rows):
            raise InputError(f"layer {self.index}: {ladder.budget.shortfall(rows)}")
        self.dtype, self.device = key_states.dtype, key_states.device
        kept = self._kept
        if not kept or not all(map(_fits, (key_states, value_states), (kept[0].keys, kept[0].values))):
            kept = plan.allocate(key_states, value_states, self.steps.slots if self.max_length else 0)
            self.steps.counters = torch.zeros(3, dtype=torch.long, device=self.device)
            self._kept = kept if self.max_length else ()
        queries = None
        if plan.tracker.query_statistics and ladder.bounded:
            queries = QueryMoments("query_covariance" in plan.tracker.query_statistics)
        none = torch.zeros(rows, dtype=torch.long)
        self._held = LayerContents(plan, kept[0], kept[1:], queries, none, none)
        self.is_initialized = True
        self.steps.replan(fresh=bool(plan.learners))
        if self.steps.compiles and self.device.type != "cpu":
            self.steps.warm_up(self._held)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the new tokens ``[B, H_kv, Q, D]`` and return what attention should read.

        Raises:
            InputError: wrong shape, dtype, device or batch size.
            NonFiniteError: NaN or infinity.
                Nothing has changed in this layer then; the cache takes back the layers before it.
        """
        if not (torch.compiler.is_compiling() or recorded.on):
            return self._update_eagerly(key_states, value_states)
        step = key_states.shape[2] == 1 and self.steps.ready and self.is_compileable
        if step:
            self.steps.append_compiled(key_states, value_states)
        else:
            self._update_eagerly(key_states, value_states)  # a prompt: the graph ends here and goes on after
        return CompiledHandle(self, step), CompiledHandle(self, step)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update_eagerly(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self._before = None
        if not self._maintained:
            self.maintain(keys.shape[2] if keys.dim() == 4 else 0)
        self._maintained = False
        held, before = self._held, 0 if self._held is None else self._held.logical
        if not _like(keys, values, self.steps.buffers):
            check_tokens(self.index, keys, values, None if held is None else (held.window.keys, held.window.values))
        self._check_room(keys.shape[2])
        if keys.device.type != "cpu" or not bool(torch.isfinite(keys.sum() + values.sum())):
            # nothing may be learnt that cannot be unlearnt: what an empty layer learns is forgotten with its tokens
            soon = self.plan.attention != "stock" and not before
            reads = {"soon" if soon else "at_once": bool(self.plan.learners)}
            keys, values = self.plan.finite(self.index, keys, values, before, self.plan.on_nonfinite, **reads)
        if held is None:
            self.lazy_initialization(keys, values)
            held = self.known
        if not before and not self.reading:
            for quantizer in self.plan.learners:
                quantizer.forget()
        step = self.steps.ready and before > 0 and keys.shape[2] <= MOST_TOKENS and not self.reading
        taken_back = before > 0 and not self.reading and (not step or self.plan.observes)
        whole = taken_back and not step
        self._before = before, held.snapshot(step, before) if whole else partial(held.drop_newest, before)
        if step:
            # tokens that may be taken back, or are to stay, leave the window to nobody; most steps find it not full anyway
            rule = self.steps.rules[self.record_past or self.holding or self.steps.roomy]
            buffers = self.steps.buffers or self.steps.wire(held)
            with self.tearing("taking tokens in"):
                take_in(self.steps.step_plan, keys, values, buffers, rule)
                held.logical += keys.shape[2]
                if self.device.type == "cpu":
                    self.steps.coming = 0  # the host's numbers are the device's
                else:
                    self.steps.behind = True
            if taken_back:  # not before: what is noted of a token is where the token has gone
                self._before = before, held.snapshot(step, before)
            if self.steps.step_plan.refused:
                self.steps.tell_refused()
        else:
            self.pending, self.steps.quiet = (keys.detach(), values.detach()), 0
            held.logical += keys.shape[2]
        if self.plan.attention == "stock" and not before:
            self.finish_pending()
            return keys, values
        return Handle(self, "key", keys), Handle(self, "value", values)

    def get_seq_length(self) -> Any:
        """Logical length: tokens the model has seen, stored or not; a tensor inside a compiled graph."""
        if torch.compiler.is_compiling() or recorded.on:
            return self.steps.counters[LOGICAL] if self.steps.ready else self.logical
        owner = None if self.owner is None else self.owner()
        before = None if owner is None else owner.length_before(self.index)
        return self.logical if before is None else before

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks of steps that are compiled span all slots, those of other passes the logical length.

        Raises:
            InputError: if the tokens would pass ``max_length``. The model asks before its first layer runs, whose own
                state (a convolution's, say) could not be taken back.
        """
        if not (torch.compiler.is_compiling() or recorded.on):
            self._check_room(int(query_length))
        if query_length == 1 and self.steps.ready and self.is_compileable:
            return self.steps.slots, 0
        return self.logical + int(query_length), 0

    def _check_room(self, tokens: int) -> None:
        """Refuse tokens past ``max_length``, reading the device's length only where it may matter."""
        known = 0 if self._held is None else self._held.logical
        if self.max_length is not None and known + self.steps.coming + tokens > self.max_length:
            check_room(self.index, self.logical, tokens, self.max_length)

    def stop_compiling(self) -> None:
        """Steps are eager from here on; nothing is reserved for others."""
        self.steps.compiles = False
        if self._held is not None and self.max_length is None:
            for store in self.held.stores:
                store.give_back()
            self.changed()
        self.steps.rewire()

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
        if self._held is None:
            return
        self._before = None
        if tokens_to_remove:
            self.finish_pending()
            self.held.crop(max(0, self.logical + tokens_to_remove))
            if not self.logical:
                self.reset()
                return
            self.changed()
        self.pack_due()
        self.rank(due=True)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows; packed tiles are shared between copies."""
        if self._held is None:
            return
        self.finish_pending()
        self._before = None
        self.held.select_rows(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)
        self.changed()

    reorder_cache = batch_select_indices  # beam search

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        if self._held is not None:
            self.batch_select_indices(torch.arange(self._held.rows).repeat_interleave(repeats))

    # --- a pass ---
    def rollback(self) -> None:
        """Be again as before the forward pass that is under way; nothing happens if none is."""
        if self._before is None:
            return
        (logical, restore), self._before = self._before, None
        if not logical:
            self.reset()
            return
        self.pending, held = None, self.held
        if self.reading:
            held.logical = logical
            return
        restore()
        self.steps.counters[NONFINITE].zero_()
        self.changed()

    # --- between passes ---
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def maintain(self, coming: int = 0) -> None:
        """Between two passes: rank what is due and make room for ``coming`` tokens. The only place where buffers move."""
        self._maintained = coming > 0
        if self._held is None:
            return
        held, steps = self._held, self.steps
        if self.rests_until(coming):
            self._before = None
            steps.quiet -= coming
            steps.coming += coming
            return
        self.finish_pending()
        self._before = None
        if self.device.type == "cpu":
            self.sync()
        if not self.reading:
            if self.record_past:
                self.pack_due()  # whatever the last verification rejected has been cropped by now
            self.rank(due=True)
            if coming <= MOST_TOKENS:
                self._make_room(held, coming)
        self.steps.coming += coming
        if self.max_length is None and held.logical + self.steps.coming > self.steps.slots:
            self.steps.slots = bucket(held.logical + self.steps.coming)
        self.steps.wire(held)
        self.steps.look_ahead(held)

    def rests_until(self, coming: int) -> bool:
        """Whether ``coming`` tokens may come before there is anything to do."""
        steps, kept = self.steps, self.holding or self.reading or self.record_past
        quiet = 0 < coming <= steps.quiet and (steps.roomy or coming == 1)
        return quiet and not kept and not (steps.stale and self.device.type == "cpu")

    def _make_room(self, held: LayerContents, coming: int) -> None:
        """Room for ``coming`` tokens in the window, and reserved tiles for what they send out of it."""
        window, ladder = held.window, self.plan.ladder
        keep = self.record_past or self.holding or not held.stores
        for unseen in (self.steps.coming, 0):
            tokens = window.longest + unseen  # at most: what the host has not seen yet may have left the window
            due = 0 if keep or tokens < ladder.threshold else (tokens - ladder.threshold) // ladder.tile + 1
            slots = tokens - due * ladder.tile + coming
            if slots <= window.capacity and (not due or held.stores[0].ahead() >= due):
                break
            self.sync()
        else:
            if due and self.max_length is None and not self.steps.compiles:
                self.pack_due()
                slots = window.longest + coming
            elif due:  # a step is compiled or recorded anew where buffers move: seldom
                store = held.stores[0]
                store.reserve(due, due if self.max_length is not None else max(due, 4, store.tiles // AHEAD))
            if slots > window.capacity:
                window.reserve(slots if keep or not held.packed else max(slots, ladder.threshold - 1 + coming))
            self.steps.rewire()

    def finish_pending(self, padding: Tensor | None = None, statistics: Mapping[str, Tensor] | None = None) -> None:
        """Take in what ``update`` left pending, right after attention; ``padding, statistics``: as for ``place_prompt``."""
        if self.pending is None:
            return
        held = self.held
        if self.reading:
            held.logical -= self.pending[0].shape[2]
            self.pending = self._before = None
            return
        kept = None if self.holding else REJECTABLE if self.record_past else 0
        with self.moving("fp16") as moved:
            chunk, self.pending = [*self.pending], None
            moved["encode"], moved["evict"] = place_prompt(held, chunk, padding, statistics or {}, kept)

    def settle(self, prompt: bool = False) -> None:
        """Finish what is under way: what is pending is placed, what is due is packed and ranked.

        Args:
            prompt: what is due goes where a prompt's tokens would, on any tier.
        """
        self.finish_pending()
        self._before, self._maintained = None, False
        if self._held is not None and not self.record_past:
            self.pack_due(prompt)
            self.rank(due=True)

    def commit(self) -> bool:
        """The pass is over, and stays; says whether ``rest`` is to pack and rank what is due."""
        rests = bool(self.steps.quiet) or (self.steps.behind and self.device.type != "cpu")
        if rests or self.pending is None:
            self._before = None
        return not rests

    def rest(self) -> None:
        """The pass is over: what is due is packed and ranked at once, where the host need not wait for the device to know."""
        if self.commit():
            self.settle()
        if self.steps.compiles and self.steps.buffers is None and self._held is not None:
            self.steps.wire(self._held)  # a compiled step may come without anybody asking for the mask

    def pack_due(self, prompt: bool = False) -> None:
        """Encode what has left the window; ``prompt``: it may be placed on any tier."""
        if self.plan.ladder.tiers and not self.holding and self.held.window.longest >= self.plan.ladder.threshold:
            with self.moving("fp16") as moved:
                moved["encode"], moved["evict"] = compress_due(self.held, prompt)

    def rank(self, due: bool = False) -> None:
        """Re-score every token and move what is over capacity down the ladder.

        Args:
            due: only in rows that have taken ``plan.every`` tokens since they were last ranked, and not while a pass is open.
                Rows that came at different times are not due together, and each must go on as it would alone.
        """
        if self._held is None or not self.plan.ladder.bounded:
            return
        rows = torch.ones(self._held.rows, dtype=torch.bool)
        if due:
            if not self.may_be_due or not bool((rows := self.due_rows()).any()):
                return
            self.pack_due()
        held = self.held
        held.ranked_at = held.ranked_at.masked_fill(rows, held.logical)
        with self.moving(held.stores[-1].tier.name) as moved:
            moved["demote"], moved["evict"] = rank(held, rows)
            moved["reassign"] = moved["demote"] + moved["evict"]

    @property
    def may_be_due(self) -> bool:
        """Whether rows may have to be ranked now, as far as the host knows."""
        held = self._held
        if held is None or not self.plan.ladder.bounded or self.holding or self._before is not None:
            return False
        return held.logical + self.steps.coming - int(held.ranked_at.min()) >= self.plan.every

    @property
    def waits_for_ranking(self) -> bool:
        """Whether rows may be ranked now, as ``maintain`` would, together with those of other layers."""
        return self.pending is None and not (self.reading or self.record_past) and self.may_be_due

    def due_rows(self) -> Tensor:
        """Rows that have taken ``plan.every`` tokens since they were last ranked, bool ``[B]`` on the CPU."""
        return self.logical - self.known.ranked_at >= self.plan.every

    def ranked(self, rows: Tensor, moved: dict[str, int], moves: bool, before: int, started: float) -> None:
        """Go on after a ranking of several layers.

        Args:
            rows: bool ``[B]`` (CPU) of the rows that were ranked.
            moved: tokens that were moved, by kind of event.
            moves: whether buffers are others now.
            before: bytes that were held before.
            started: when it began, by ``time.perf_counter``.
        """
        held = self.known
        held.ranked_at = held.ranked_at.masked_fill(rows, held.logical)
        if self.plan.shifted:
            self.changed()
        else:  # steps find all they need where it was, unless buffers are others
            self._encoded = held.encoded
            self.steps.coming = self.steps.quiet = 0
            if moves:
                self.steps.rewire()
        _tell(self, {**moved, "reassign": sum(moved.values())}, before, started, held.stores[-1].tier.name)

    def held_bytes(self) -> int:
        """Bytes that the layer holds, for events; 0 if nobody hears of them."""
        return storage_bytes(self.tensors()) if self.plan.heard else 0

    def changed(self) -> None:
        """The host has moved tokens: shifts are worked out anew, and steps find what there is now."""
        if self._held is None:
            return
        if self.plan.shifted:
            pending = 0 if self.pending is None else self.pending[0].shape[2]
            note_shifts(self._held.window, self._held.stores, self._held.logical - pending)
        self._encoded = self._held.encoded
        self.steps.start_from(self._held)

    @contextlib.contextmanager
    def moving(self, source: str = "") -> Iterator[dict[str, int]]:
        """Tokens move inside the block, which says how many by kind of event; ``source``: where evicted ones were.

        Errors of FADE's own come before anything has moved; whatever else ends the block leaves the layer torn.
        """
        started, before, moved = time.perf_counter(), self.held_bytes(), dict[str, int]()
        with self.tearing("moving tokens between tiers"):
            yield moved
            self.changed()
        _tell(self, moved, before, started, source)

    @contextlib.contextmanager
    def tearing(self, what: str) -> Iterator[None]:
        """What is held is written inside the block; errors of FADE's own are raised before that."""
        self.torn = what
        try:
            yield
        except FadeError:
            self.torn = ""
            raise
        self.torn = ""


def _tell(layer: TieredLayer, moved: Mapping[str, int], before: int, started: float, source: str = "") -> None:
    """Send an event for each kind of move that there was, and for every ranking."""
    if not any(moved.values()) and "reassign" not in moved:
        return
    for quantizer in layer.plan.learners:
        if quantizer.shortcoming:
            layer.plan.emit_once({"op": "encode", "quantizer": quantizer.kind, "reason": quantizer.shortcoming})
    if not layer.plan.heard:
        return
    seconds, after = time.perf_counter() - started, layer.held_bytes()
    for kind, tokens in moved.items():
        if tokens or kind == "reassign":
            detail = {"length": layer.logical} | ({"from": source} if source and kind == "evict" else {})
            layer.plan.emit(Event(kind, layer.index, tokens, before, after, seconds, detail))


def _fits(new: Tensor, held: Tensor) -> bool:
    """Whether tokens ``[B, H_kv, T, D]`` fit buffers in all but their number."""
    (rows, heads, _, dim), like = new.shape, held.shape
    return (rows, heads, dim, new.dtype, new.device) == (like[0], like[1], like[3], held.dtype, held.device)


def _like(keys: Tensor, values: Tensor, held: LayerBuffers | None) -> bool:
    """Whether new tokens are plainly like those that are held: what is not is looked at closely, and refused by name."""
    if held is None or keys.dim() != 4 or values.dim() != 4 or not 0 < keys.shape[2] == values.shape[2]:
        return False
    return _fits(keys, held.keys) and _fits(values, held.values)


class Handle(Tensor):
    """The keys or values of a layer, ``[B, H_kv, T, D]`` in name only.

    FADE's attention takes the layer out of it and reads packed tiers. Any other operation gets the dequantised tokens,
    so stock attention works too, at the price of materialising one layer.
    """

    layer: TieredLayer
    side: str

    @staticmethod
    def __new__(cls, layer: TieredLayer, side: str, newest: Tensor) -> Handle:
        """A handle on each "key" or "value" that ``layer`` has seen, whatever is stored; like the ``newest`` of them."""
        shape = (*newest.shape[:2], layer.known.logical, newest.shape[3])
        handle: Handle = Tensor._make_wrapper_subclass(cls, shape, dtype=newest.dtype, device=newest.device)
        handle.layer, handle.side = layer, side
        return handle

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Handle({type(self.layer).__name__}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def plain(value: Any) -> Any:
            return dense(value.layer.held, value.side, value.layer.pending) if isinstance(value, Handle) else value

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class CompiledHandle:
    """What ``update`` returns inside a compiled graph: FADE's attention takes the layer out of it.

    Args:
        layer: the layer that has taken the new tokens in.
        stepping: whether it did so by its op, as a step of one token; else attention is eager too.
    """

    def __init__(self, layer: TieredLayer, stepping: bool) -> None:
        self.layer, self.stepping = layer, stepping

    def to(self, *_: Any, **__: Any) -> CompiledHandle:
        """Itself: the tokens stay where they are."""
        return self
