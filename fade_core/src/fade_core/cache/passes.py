"""A forward pass over all layers of a cache: it begins, and commits or rolls back as a whole."""

from __future__ import annotations

import copy
import threading
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, LinearAttentionCacheLayerMixin, StaticLayer

from fade_core.cache.layer import TieredLayer
from fade_core.cache.ranking_rounds import rank_due
from fade_core.config import FadeConfig
from fade_core.errors import InputError, UnsupportedModelError
from fade_core.interfaces import Event
from fade_core.ops.buffers import LOGICAL
from fade_core.support.checks import check_finite, check_room, check_tokens
from fade_core.support.recording import recorded


class PassControl(Cache):
    """What the model calls during a pass; a part of ``TieredKVCache``.

    A pass begins with the first layer's tokens. It commits after the last layer's attention; under stock attention, which
    says nothing, when the next pass begins or anything else is done with the cache. A pass that has not reached every
    tiered layer by then was interrupted, and is undone.
    """

    layers: list[Any]
    config: FadeConfig
    length_limit: int | None
    attention: str
    model_config: Any
    weights_fingerprint: str | None
    refusals: dict[str, list[tuple[str, str]]]
    device: torch.device
    attached: bool

    @property
    def tiered(self) -> list[TieredLayer]:
        """The layers that FADE compresses."""
        return [layer for layer in self.layers if isinstance(layer, TieredLayer)]

    def start_passes(self) -> None:
        """No pass is under way."""
        self._tiered = [i for i, layer in enumerate(self.layers) if isinstance(layer, TieredLayer)]
        self._last = max(i for i, layer in enumerate(self.layers) if i in self._tiered or _replaces_tensors(layer))
        self._reading = False
        for layer in self.tiered:
            layer.owner = weakref.ref(self)
        self._updated: set[int] = set()
        self._entered: int | None = None  # the layer that is taking tokens in
        self._thread = 0  # whose pass it is
        self._attending = False  # whether the last layer's attention is under way, or has to come
        self.in_model = False  # whether a call of the model runs FADE's attention with this cache
        self._begun = 0
        self._before: dict[int, dict[str, Any]] = {}
        self._overwritten: set[int] = set()

    def conclude(self) -> None:
        """Commit the pass that is under way, or undo it if it was interrupted.

        Raises:
            InputError: if it was interrupted and some layer cannot be taken back; the cache is empty then. If another thread is
                at it; nothing has changed then.
        """
        self._refuse_other_threads()
        torn = next((layer for layer in self.tiered if layer.torn), None)
        if torn is not None:
            what, empty = torn.torn, self.under_way and not self._begun
            self.reset()
            if not empty:
                raise InputError(
                    f"layer {torn.index} was interrupted while {what}: what it held cannot be told any more, so the whole "
                    "cache was emptied. Start again from the first token."
                )
            return
        if not self._updated and self._entered is None:
            return
        if not self.under_way:
            self._before.clear()
            self._overwritten.clear()
            self._updated.clear()
            layers = self.tiered
            rank_due([layer for layer in layers if layer.commit()])
            for layer in layers:
                layer.rest()
            return
        failed = max(self._updated, default=-1) if self._entered is None else self._entered
        outcome = self._roll_back(failed, len(self.layers))
        if not self.get_seq_length() and self._begun:
            raise InputError(f"the last forward pass was interrupted. {outcome}")

    @property
    def under_way(self) -> bool:
        """Whether a pass has begun and not reached its end; if nobody is at it, it was interrupted."""
        begun = bool(self._updated) or self._entered is not None
        return begun and (self._entered is not None or self._attending or not self._updated.issuperset(self._tiered))

    def length_before(self, index: int) -> int | None:
        """Tokens of layer ``index`` before the pass that is under way, if it takes tokens in there; else ``None``.

        As long as a pass may have to be taken back its tokens do not count: whoever asks after an interruption must not be told
        of what the next use takes back.
        """
        concerned = index in self._updated or index == self._entered
        return self._begun if concerned and not self._reading and self.under_way else None

    def attends(self, layer: TieredLayer) -> None:
        """A layer's attention begins. The pass is not over before the last one's has ended, and ``attended`` says so."""
        self._attending = layer.index == self._last

    def attended(self) -> None:
        """A layer's attention has ended: if it was the last one's, so has the pass."""
        if self._attending:
            self._attending = False
            self.conclude()

    def detach(self) -> None:
        """Let passes with this cache run the model's own attention. It keeps its contents; calling twice is harmless."""
        self.attached = False

    def settle(self) -> None:
        """Finish what is under way: an interrupted forward pass is undone, what is due is packed and ranked."""
        self.conclude()
        for layer in self.tiered:
            layer.settle()

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new tokens ``[B, H_kv, Q, D]`` to a layer.

        Raises:
            InputError: for tokens that it cannot take, or a layer that does not exist. Nothing has changed then: layers
                before it are taken back.
        """
        if not 0 <= layer_idx < len(self.layers):
            raise InputError(f"layer {layer_idx} does not exist: the cache was built for {len(self.layers)} layers")
        layer = self.layers[layer_idx]
        if torch.compiler.is_compiling() or recorded.on:
            traced: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
            return traced
        if self._reading and not isinstance(layer, TieredLayer):
            apart: tuple[Tensor, Tensor] = copy.copy(layer).update(key_states, value_states, *args, **kwargs)
            return apart
        if not self._updated or layer_idx in self._updated or self._entered is not None:
            self.conclude()
        if not self._updated:
            self._begun, self._attending = int(self.get_seq_length()), False
            self._thread = threading.get_ident()
        self._refuse_other_threads()
        self._entered = None if self._reading else layer_idx
        try:
            if _replaces_tensors(layer):
                key_states, value_states = self._admitted(layer, layer_idx, key_states, value_states)
                self._before[layer_idx] = dict(vars(layer))
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        except InputError as error:
            self._entered = None
            outcome = self._roll_back(layer_idx, layer_idx)
            raise type(error)(f"{error} {outcome}") from None
        if not self._reading:
            self._updated.add(layer_idx)
        if layer_idx == self._last and self.in_model and not self._reading:
            self._attending = isinstance(layer, TieredLayer) and layer.plan.observes
        self._entered = None
        if layer_idx == self._last and not isinstance(layer, TieredLayer):
            self.conclude()
        return found

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Hand a linear layer its convolution's state, which it writes over: that cannot be taken back."""
        self._overwritten.add(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Likewise its recurrent state."""
        self._overwritten.add(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the mask of the next pass. It is asked for before each: that is when tokens move."""
        if not (torch.compiler.is_compiling() or recorded.on):
            self.conclude()
            layers = self.tiered
            rank_due([layer for layer in layers if not layer.rests_until(int(query_length))])
            for layer in layers:
                layer.maintain(int(query_length))
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Logical length for masks; a tensor where only the device knows it (compiled steps)."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if isinstance(layer, TieredLayer) and layer.steps.stale:
            return layer.steps.counters[LOGICAL]
        return self.get_seq_length(layer_idx)

    def reset(self) -> None:
        """Forget everything; the cache can be used again. Memory is freed, save for buffers of fixed size, which stay."""
        self._before.clear()
        self._overwritten.clear()
        self._updated.clear()
        self._entered, self._attending = None, False
        for layer in self.tiered:
            layer.record_past = False
        super().reset()

    # --- inside ---
    def _refuse_other_threads(self) -> None:
        """Raise ``InputError`` in another thread than that whose pass is under way."""
        if self.under_way and self._thread != threading.get_ident():
            raise InputError(
                "a forward pass of another thread is under way with this cache, or ended in its middle. Give each thread a "
                "cache of its own (copy.deepcopy makes one); reset() empties this one"
            )

    def _check_all(self, method: str) -> None:
        """Refuse what transformers' own layers of fixed size do not offer. Raises ``UnsupportedModelError``."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, StaticLayer) and not hasattr(layer, method):
                raise UnsupportedModelError(
                    f"layer {index}: transformers' {type(layer).__name__} has no {method}, which assisted decoding, taking "
                    "tokens back or choosing rows needs; create the cache without max_cache_len for this"
                )

    def _admitted(self, layer: DynamicLayer, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens that a layer of transformers' own can take. Raises ``InputError``."""
        length = layer.get_seq_length()
        check_tokens(index, keys, values, (layer.keys, layer.values) if length else None)
        check_room(index, length, keys.shape[2], self.length_limit)
        return check_finite(index, keys, values, length, self.config.on_nonfinite)

    def taken_back(self, index: int, error: InputError) -> InputError:
        """Undo the pass that is under way: the ``error`` that layer ``index`` found, and what became of the cache."""
        outcome = self._roll_back(index, index + 1)
        return type(error)(f"{error} {outcome}")

    def _roll_back(self, failed: int, end: int) -> str:
        """Undo the pass in the layers before ``end``; says what became of the cache.

        Args:
            failed: the layer that refused, for the event.
            end: layers from here on have not taken anything in.
        """
        lost = [index for index in range(end) if not self._took_back(index)]
        self._emit(Event("rollback", failed, detail={"length": 0 if lost else self._begun}))
        self._updated.clear()
        self._entered, self._attending = None, False
        if lost:
            name = type(self.layers[lost[0]]).__name__
            self.reset()
            return (
                f"Layer {lost[0]} ({name}) cannot be taken back a step, so the whole cache was emptied: start again from "
                "the first token."
            )
        self._before.clear()
        self._overwritten.clear()
        return "The cache is as it was before this step."

    def _took_back(self, index: int) -> bool:
        layer = self.layers[index]
        if isinstance(layer, TieredLayer):
            layer.rollback()
            return layer.logical <= self._begun
        if index in self._before:
            vars(layer).clear()  # what the pass added goes too
            vars(layer).update(self._before.pop(index))
        elif index in self._overwritten:
            layer.reset()
            return not self._begun
        elif isinstance(layer, StaticLayer):
            return int(layer.get_seq_length()) <= self._begun
        return True


def _replaces_tensors(layer: Any) -> bool:
    """Whether a layer of transformers' own makes new tensors at each update, so that the old ones can be gone back to."""
    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)


def can_be_read(layer: Any) -> bool:
    """Whether a forward pass can leave a layer as it was."""
    return isinstance(layer, TieredLayer) or _replaces_tensors(layer)
