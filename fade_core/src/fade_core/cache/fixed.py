"""A layer of fixed size: buffers that never move and lengths on the device, so that a decode step compiles as one graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fade_core.cache.fixedplan import ARRIVING, bucket, room
from fade_core.cache.handle import Handle
from fade_core.cache.layer import REJECTABLE, TieredLayer
from fade_core.cache.layer_plan import LayerPlan
from fade_core.errors import ConfigError, InputError, NonFiniteError
from fade_core.interfaces import Kernel
from fade_core.ops.append import LOGICAL, NONFINITE, ODD_MASK, AppendRule
from fade_core.ops.step import plan_step
from fade_core.storage.evictingstore import EvictingStore
from fade_core.storage.fixedstore import FixedStore
from fade_core.storage.fixedwindow import FixedWindow
from fade_core.storage.tier_store import TierStore
from fade_core.storage.window import Window
from fade_core.support.checks import check_room, check_tokens
from fade_core.support.transfer import sent


class Step:
    """What a compiled ``update`` returns in place of keys and values: FADE's attention takes the layer out of it.

    Args:
        layer: the layer that has taken the new tokens in.
        stepping: whether it did so by its op, as a step of one token; else attention is eager too.
    """

    def __init__(self, layer: FixedLayer, stepping: bool) -> None:
        self.layer, self.stepping = layer, stepping

    def to(self, *_: Any, **__: Any) -> Step:
        """Itself: the tokens stay where they are."""
        return self


class FixedLayer(TieredLayer):
    """A ``TieredLayer`` of one packed tier, in buffers for ``slots`` tokens that are allocated once.

    Prompts, rejected drafts, beams and checkpoints go the way of the growing layer, eagerly and on the host's book. A
    step of one token goes through two custom ops that read and write the device's lengths; the host's book is brought
    up to date when somebody asks for it, from one number read back. Both ways encode the same tiles.

    Where tokens are evicted, buffers are for those that stay (``room``). They are ranked between two passes, when the
    cache is asked for the size of a mask (``between``), and close their gaps in place.

    Args:
        plan: what the layer is made of.
        max_length: most tokens the layer may see.
        meaning: what its quantizers were made from, written out.
        append: implementation of the op ``append``.
        query_heads: query heads of the model.

    Attributes:
        slots: tokens that the buffers have room for.
        evicts: whether tokens are evicted.
        watches: whether this layer looks at the masks of steps for all layers.
        trusting: whether the mask of a step is taken to hide padding alone, as the prompt's did.
    """

    def __init__(self, plan: LayerPlan, max_length: int, meaning: str, append: Kernel, query_heads: int = 0) -> None:
        ladder = plan.ladder
        self.slots, self.meaning = bucket(max_length), meaning
        self.threshold = ladder.n_sink + ladder.recent_window + ladder.tile
        self.append, self.query_heads = append, query_heads
        self.evicts = ladder.bounded
        self._kept: tuple[FixedWindow, FixedStore] | None = None
        self._noted = list[Tensor]()
        self._logical = self._behind = self._asked = self._open = self._unseen = 0
        self._stale = self.ready = self.stepping = self.trusting = self.watches = False
        super().__init__(plan, max_length)
        self.replan()

    def replan(self) -> None:
        """Take the plan of the quantizers as they are now."""
        ladder, plan = self.plan.ladder, self.plan
        rule = AppendRule(ladder.tiers[0], ladder.n_sink, self.threshold, plan.on_nonfinite, plan.index)
        self.step_plan = plan_step(rule, self.append, plan.kernel, plan.mass_kernel, plan.tracker, self.meaning)
        self.step_name = self.step_plan.name

    def fresh(self) -> FixedLayer:
        layer = FixedLayer(self.plan, self.max_length or self.slots, self.meaning, self.append, self.query_heads)
        layer.watches = self.watches
        return layer

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        """Whether the next step of one token may be compiled; drafts that may be rejected are kept eager."""
        return not (self.record_past or self.reading)

    # --- buffers ---
    def _blank(self) -> None:
        self._stale = self.ready = self.stepping = self.trusting = False
        self._behind = self._asked = self._open = self._unseen = 0
        self._noted = []
        super()._blank()
        if self._kept is not None:  # addresses stay: compiled graphs know them
            self._kept[0].clear()
            self._kept[1].clear()
            self._counters.zero_()

    def _buffers(
        self, batch: int, heads: int, key_dim: int, value_dim: int, statistics: tuple[str, ...]
    ) -> tuple[Window, tuple[TierStore, ...]]:
        ladder = self.plan.ladder
        self.replan()  # codebooks may have been set
        shape = (batch, heads, self.threshold + REJECTABLE)
        if self._kept is None or not self._fits(self._kept[0], (*shape, key_dim), (*shape, value_dim)):
            window = FixedWindow(batch, heads, key_dim, value_dim, shape[2], self.dtype, self.device, statistics)
            made = ladder.tiers[0], batch, heads, self.device, self.dtype, room(self.plan, self.slots), self.plan.codec
            ranked = not self.plan.policy.positional
            self._kept = window, EvictingStore(*made, ranked, statistics) if self.evicts else FixedStore(*made)
            self._counters = torch.zeros(3, dtype=torch.long, device=self.device)
            self._wire()
            if self.device.type != "cpu":
                self.rehearse()
        return self._kept[0], (self._kept[1],)

    def _fits(self, window: FixedWindow, keys: tuple[int, ...], values: tuple[int, ...]) -> bool:
        shapes = tuple(window.keys.shape), tuple(window.values.shape)
        return shapes == (keys, values) and (window.keys.dtype, window.keys.device) == (self.dtype, self.device)

    def _wire(self) -> None:
        """Lay out what a step hands to its ops, and promise the compiler that it stays there."""
        window, store = self._parts()
        self._first = torch.zeros(len(store.per_head), dtype=torch.long, device=self.device)
        tier = store.tier
        self._key_fields = [store.fields[f"k.{name}"] for name in tier.keys.field_shapes()]
        self._value_fields = [store.fields[f"v.{name}"] for name in tier.values.field_shapes()]
        self._window_keys, self._window_values = window.keys, window.values
        self._lengths, self._used = window.device_lengths, store.used
        self._window_notes, self._tile_notes = list[Tensor](), list[Tensor]()
        if isinstance(store, EvictingStore):
            self._window_notes = [window.offsets, *window.statistics.values()]
            self._tile_notes = [store.held_offsets, *store.held_statistics.values()]
        for tensor in (
            *(*self._key_fields, *self._value_fields, self._window_keys, self._window_values),
            *(self._lengths, self._used, self._counters, self._first, *self._window_notes, *self._tile_notes),
        ):
            # unguarded: another cache of the same shapes runs the same graph, and CUDA graphs are recorded anew
            torch._dynamo.mark_static_address(tensor, guard=False)

    @torch.no_grad()
    def rehearse(self) -> None:
        """Run a step on empty buffers and undo it.

        What ops and quantizers make once and keep (compiled kernels, rotations on the device) is made here, outside the memory
        pool of a CUDA graph, where nothing may stay behind.
        """
        window, store = self._parts()
        batch, heads, _, dim = self._window_keys.shape
        self._first.zero_()
        token = self._window_keys.new_zeros((batch, heads, 1, dim)), self._window_values[:, :, :1].clone()
        self._step_in(*token)
        query = token[0].new_zeros((batch, max(self.query_heads, heads), 1, dim))
        self.attend(query, None, 1.0, None, None)
        self._counters.zero_()
        window.clear()
        store.clear()

    def _parts(self) -> tuple[FixedWindow, FixedStore]:
        if self._kept is None:
            raise InputError(f"layer {self.index} is empty: it has not seen a token yet")
        return self._kept

    # --- the host's book, brought up to date by whoever reads it ---
    @property
    def logical(self) -> int:
        """Tokens the model has seen."""
        self._catch_up()
        return self._logical

    @logical.setter
    def logical(self, length: int) -> None:
        self._logical = length

    @property
    def window(self) -> Window | None:
        """The full-precision tokens."""
        self._catch_up()
        return self._window_now

    @window.setter
    def window(self, window: Window | None) -> None:
        self._window_now = window

    @property
    def stores(self) -> tuple[TierStore, ...]:
        """The packed tokens."""
        self._catch_up()
        return self._stores_now

    @stores.setter
    def stores(self, stores: tuple[TierStore, ...]) -> None:
        self._stores_now = stores

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _catch_up(self) -> None:
        """Bring the host's book up to the device's, if steps were taken since it was last: one read back.

        Raises:
            InputError: if compiled steps went past ``max_cache_len`` or were given a mask that hid stored tokens.
            NonFiniteError: if compiled steps were given NaN or infinity.
        """
        if self._stale or self._behind:
            counters = self._counters.tolist()
            self._complain(counters)
            self._behind, self._stale = counters[LOGICAL] - self._logical, False
            self._asked = 1  # somebody may have asked, and not fed yet
        if self._behind:
            steps, self._behind = self._behind, 0
            self._advance(steps)

    def _complain(self, counters: list[int]) -> None:
        what, error = "", InputError
        if self.max_length is not None and counters[LOGICAL] > self.max_length:
            what = f"{counters[LOGICAL]} tokens were fed to a cache of max_cache_len={self.max_length}"
        if counters[ODD_MASK]:
            what = f"{counters[ODD_MASK]} steps came with a mask that hides stored tokens, while the prompt's hid padding alone"
        if counters[NONFINITE]:
            error, what = NonFiniteError, "steps brought NaN or infinity"
        if what:
            raise error(f"layer {self.index}: {what}; compiled steps cannot refuse. Call reset() and start again")

    def _advance(self, steps: int) -> None:
        """Do on the host's book what ``steps`` tokens did on the device's."""
        window, store = self._parts()
        ladder = self.plan.ladder
        self._logical += steps
        self.since_ranking = self.since_ranking + steps
        held = window.lengths + steps
        due = (held - 1 - ladder.n_sink - ladder.recent_window).div(ladder.tile, rounding_mode="floor").clamp_min(0)
        space = store.max_tiles - store.per_head.amax(1)
        if self.evicts and bool((due > space).any()):
            raise InputError(
                f"layer {self.index}: {steps} compiled steps went by and nothing was evicted; ask the cache for "
                "get_mask_sizes(1, 0) before each step, as generate does. Call reset() and start again"
            )
        left = torch.minimum(due, space)
        window.take_lengths(held - left * ladder.tile)
        if self.evicts:  # steps wrote the positions
            store.occupy(store.per_head + left[:, None])
        else:
            begun = store.per_head[:, 0] > 0
            store.occupy(store.per_head + left[:, None], torch.where(begun, store.first, self.padding + ladder.n_sink))
            window.locate(window.lengths, self.padding, ladder.n_sink, store.per_head[:, 0] * ladder.tile)
        encoded = int(left.sum()) * ladder.tile * store.heads
        if encoded:
            self._report("encode", encoded, self.nbytes(), 0.0)
        for op, kernel, reason in sorted(self.step_plan.refused):
            self._say_once({"op": op, "kernel": kernel, "reason": reason})

    def _publish(self) -> None:
        """Write the host's book to the device: the next step goes on from there."""
        if not self.is_initialized:
            return
        window, store = self._parts()
        if len(self._first) != len(self.padding):
            self._wire()
        window.publish()
        store.publish()
        self._counters[LOGICAL].fill_(self._logical)  # an assignment would wait for the GPU
        self._first.copy_(sent(self.padding, self.device))
        self.ready = bool((window.lengths > 0).all())

    # --- what transformers asks ---
    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take the new tokens ``[B, H_kv, Q, D]`` and return what attention should read; as ``TieredLayer.update``."""
        if torch.compiler.is_compiling():
            if self.steps(key_states.shape[2]):
                self._stale = True
                self._step_in(key_states, value_states)
                return Step(self, True), Step(self, True)
            self._update_eagerly(
                key_states, value_states, *args, **kwargs
            )  # a prompt: the graph ends here and goes on after
            return Step(self, False), Step(self, False)
        return self._update_eagerly(key_states, value_states, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _update_eagerly(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.commit()
        self.between()
        self.stepping = keys.dim() == 4 and self.steps(keys.shape[2])
        if not self.stepping:
            return super().update(keys, values, *args, **kwargs)
        if self._stale:
            self._catch_up()
        try:
            check_tokens(self.index, keys, values, (self._window_keys, self._window_values))
            check_room(self.index, self._length(), 1, self.max_length)
            self._step_in(keys, values)
        except InputError as error:
            outcome = self.plan.on_failure(self.index, self.logical)
            raise type(error)(f"{error} {outcome}".rstrip()) from None
        self._noted = [held.clone() for held in self._statistics()]  # a later layer may refuse the step that adds to it
        self._open = 1
        self._behind += 1
        return Handle(self, "key"), Handle(self, "value")

    def steps(self, queries: int) -> bool:
        """Whether the next ``queries`` tokens are a step that two custom ops take."""
        return queries == 1 and self.ready and not (self.record_past or self.reading)

    def _step_in(self, keys: Tensor, values: Tensor) -> None:
        torch.ops.fade.append(
            keys,
            values,
            self._window_keys,
            self._window_values,
            self._key_fields,
            self._value_fields,
            self._lengths,
            self._used,
            self._counters,
            self._window_notes,
            self._tile_notes,
            self.step_name,
        )

    def _statistics(self) -> list[Tensor]:
        """What steps note of tokens, positions aside."""
        return [*self._window_notes[1:], *self._tile_notes[1:]]

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def between(self, coming: int = 0) -> None:
        """Rank what is due, between two passes: tokens are evicted in place, which replays of a graph then find so.

        Args:
            coming: tokens of the pass that is about to begin.
        """
        if not self.evicts or not self.is_initialized or self.record_past or self.reading:
            return
        if not self._stale:
            self._unseen = 0
        if int(self.since_ranking.max()) + self._unseen + self._behind >= self.plan.every:
            self._catch_up()
            self.commit()
            self._unseen = 0
            if bool((self.since_ranking >= self.plan.every).any()):
                self.demote()
                self._publish()
        self._unseen += coming

    def _rank_due(self) -> None:
        """Not in the middle of a pass, which may still have to be undone: ``between`` does what is left to do."""
        if self._before is None and not self._open:
            super()._rank_due()

    def rank(self, rows: Tensor | None = None) -> None:
        """As the growing layer does, in place."""
        super().rank(rows)
        self._publish()

    def get_seq_length(self) -> Any:
        """Logical length; a tensor inside a compiled graph."""
        return self._counters[LOGICAL] if torch.compiler.is_compiling() and self.ready else self._length()

    def query_offset(self) -> Any:
        """Logical length for masks: where the host does not know it, the device's own."""
        if self._stale or (torch.compiler.is_compiling() and self.ready):
            return self._counters[LOGICAL]
        return self._length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Masks of a step span all slots, those of other passes the logical length.

        Raises:
            InputError: if the tokens would pass ``max_length``; nothing has changed then.
        """
        stepping = self.steps(int(query_length))
        if torch.compiler.is_compiling() and stepping:
            return self.slots, 0
        self._check_room(int(query_length))
        return (self.slots if stepping else self.logical + int(query_length)), 0

    def _check_room(self, tokens: int) -> None:
        """Refuse tokens past ``max_length``, reading the device's length only where it may matter."""
        if not self._stale or self._logical + self._asked + tokens > (self.max_length or 0):
            check_room(self.index, self._length(), tokens, self.max_length)
            self._asked = self._behind
        self._asked += tokens  # at least as many as will have been fed

    def _length(self) -> int:
        """The logical length, without bringing the rest of the book up to date."""
        return self.logical if self._stale else self._logical + self._behind

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        A packed tile that is cut gives what is left of it back to the window, as it decodes.
        """
        self.commit()
        self.between()
        reopened = (
            self._cut_tiles(self.logical + tokens_to_remove) if tokens_to_remove < 0 and self.is_initialized else []
        )
        super().crop(tokens_to_remove)
        if self.is_initialized:
            self._reopen(reopened)
        self._publish()

    def _cut_tiles(self, end: int) -> list[tuple[int, Tensor, Tensor]]:
        """Row, keys and values ``[H_kv, n, D]`` of tokens before ``end`` whose tile reaches past it."""
        _, store = self._parts()
        if isinstance(store, EvictingStore):
            store.kept(end)  # refuses what it cannot do
            return []
        found = []
        for row, (tiles, first) in enumerate(zip(store.per_head[:, 0].tolist(), store.first.tolist(), strict=True)):
            whole, rest = divmod(max(0, end - first), store.tile)
            if rest and whole < tiles:
                keys, values = store.decode_tile(row, whole)
                found.append((row, keys[0, :, :rest], values[0, :, :rest]))
        return found

    def _reopen(self, cut: list[tuple[int, Tensor, Tensor]]) -> None:
        """Put tokens of cut tiles behind the sinks, which are all that is left in those rows' windows."""
        if not cut:
            return
        window, store = self._parts()
        lengths = window.lengths.clone()
        for row, keys, values in cut:
            start, count = int(lengths[row]), keys.shape[1]
            window.keys[row, :, start : start + count] = keys
            window.values[row, :, start : start + count] = values
            lengths[row] += count
        ladder = self.plan.ladder
        window.locate(lengths, self.padding, ladder.n_sink, store.per_head[:, 0] * ladder.tile)

    def reset(self) -> None:
        """Forget everything; the buffers stay where they are."""
        self.record_past = False
        self._blank()

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows: in place if their number stays, else in new buffers."""
        super().batch_select_indices(indices)
        self._publish()

    # --- what attention asks ---
    def attend(
        self, query: Tensor, mask: Tensor | None, scaling: float, softcap: float | None, sinks: Tensor | None
    ) -> Tensor:
        """Attention ``[B, H_q, 1, D]`` of the token that ``update`` has just taken in.

        On a CPU every mask is honoured. Elsewhere nothing may be read back: while the prompt's mask hid nothing but
        padding, a step's is taken to do the same, and the first layer counts the steps for which that was wrong.
        """
        if mask is not None and self.trusting:
            if self.watches:
                self._watch(mask)
            mask = None
        held = self._window_keys, self._window_values, self._key_fields, self._value_fields, self._lengths, self._used
        asked = mask, sinks, scaling, softcap, self.step_name
        output: Tensor
        if self.evicts:
            output = torch.ops.fade.decode_noting(query, *held, self._window_notes, self._tile_notes, *asked)
        else:
            output = torch.ops.fade.decode_attention(query, *held, self._first, *asked)
        return output

    def _watch(self, mask: Tensor) -> None:
        where = torch.arange(mask.shape[3], device=mask.device)
        stored = (where >= self._first[:, None]) & (where < self._counters[LOGICAL])
        self._counters[ODD_MASK] += (stored & ~mask[:, 0, 0]).any()

    def shown_shape(self, side: str) -> tuple[int, int, int, int]:
        """Shape of a handle: as wide as the mask."""
        if not self.stepping:
            return self.dense_shape(side)
        held = self._window_keys if side == "key" else self._window_values
        return (held.shape[0], held.shape[1], self.slots, held.shape[3])

    def shown(self, side: str) -> Tensor:
        """What a handle decodes to; zeros where no token is yet."""
        dense = self.dense(side)
        if not self.stepping:
            return dense
        return torch.nn.functional.pad(dense, (0, 0, 0, self.slots - dense.shape[2]))

    # --- a forward pass that may fail in a later layer ---
    def commit(self) -> None:
        self._open = 0
        self._noted = []
        super().commit()

    def go_back(self) -> None:
        if self._open:
            self._open = 0
            window, _ = self._parts()
            self.logical -= 1
            window.crop(self._logical)
            for held, before in zip(self._statistics(), self._noted, strict=True):
                held.copy_(before)
        else:
            super().go_back()
        self._publish()

    def _admitted(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = super()._admitted(keys, values)
        store = self._kept[1] if self._kept is not None else None
        if isinstance(store, EvictingStore) and store.tiles:  # a first prompt is ranked before it is packed
            due = int(self._due(self._window().lengths + keys.shape[2]).max())
            spare = store.max_tiles - int(store.per_head.max())
            if due > spare * store.tile:
                raise InputError(
                    f"layer {self.index}: {keys.shape[2]} tokens at once would pack {due} beside those that are kept, before "
                    f"any is evicted; there is room for {spare * store.tile}. Feed a later prompt in chunks "
                    f"(generate(prefill_chunk_size={ARRIVING // 2})), or create the cache without max_cache_len"
                )
        return keys, values

    # --- compression ---
    def restored(self) -> None:
        self.replan()
        super().restored()

    def settle(self, padding: Tensor | None = None, statistics: Any = None) -> None:
        super().settle(padding, statistics)
        self._publish()

    def assign(self, tiers: Tensor) -> None:
        raise InputError(
            "tokens of fixed places cannot be assigned to tiers by hand; create the cache without max_cache_len"
        )

    @property
    def holding(self) -> bool:
        """Never: a window of fixed size cannot keep a prompt in full precision."""
        return False

    @holding.setter
    def holding(self, wanted: bool) -> None:
        if wanted:
            raise ConfigError(
                "a cache of fixed size cannot hold a prompt in full precision; create it without max_cache_len"
            )

    # --- introspection ---
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor the layer keeps, as "tier/kind"; after ``reset`` as before it."""
        if self._kept is None:
            return {}
        held = super().tensors()
        window, store = self._parts()
        if not held:
            held = {f"fp16/{n}": t for n, t in window.tensors().items()}
            tiled = "tiles." if store.tier.name == "fp16" else ""
            held |= {f"{store.tier.name}/{tiled}{n}": t for n, t in store.tensors().items()}
        return held | {"layer/counters": self._counters, "layer/first": self._first}
