"""A decode step of a model, recorded once as a CUDA graph and run again without Python; no compiler."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

from fade_core.cache.layer import TieredLayer
from fade_core.cache.lean_modules import LeanModules
from fade_core.cache.tiered_cache import TieredKVCache
from fade_core.support.recording import as_recorded


class StepRecorder:
    """Runs the steps of one token of ``model`` on ``cache``: the first as it is, the second recorded, all others replayed.

    A step is recorded anew where buffers of the cache have moved, and runs once as it is before that, so that whatever the
    model makes once and keeps is not made inside the graph. A model that cannot be recorded (it reads numbers back in every
    step, say) is run as it is; ``refusal`` says why.

    On a CPU nothing is captured: a replay runs the recorded operations again, on the same inputs in the same memory.

    Args:
        model: runs on one device.
        cache: one whose steps compile (``compile_refusal`` is empty).

    Attributes:
        refusal: why steps are not recorded; empty if they are.
        recorded: steps that were recorded.
        replayed: steps that were replayed.
    """

    def __init__(self, model: PreTrainedModel, cache: TieredKVCache) -> None:
        self.model, self.cache = model, cache
        self.refusal = ""
        self.recorded = self.replayed = 0
        self._inputs: list[Any] = []
        self._replay: Callable[[], Any] | None = None
        self._wiring: tuple[Any, ...] = ()
        self._buffers: list[Any] = []

    @cached_property
    def lean(self) -> LeanModules:
        """What stands in for parts of the model while a step is recorded."""
        return LeanModules(self.model)

    def __call__(self, **inputs: Any) -> Any:
        """One step with these arguments of the model; the output's tensors are good until the next step."""
        if self.refusal or not all(map(_records, self.cache.layers)):
            self.forget()
            return self.model(**inputs)
        found, spec = tree_flatten(inputs)
        wiring = (spec, *map(_kind, found), *self._layers())
        if wiring != self._wiring:  # a step of another kind: it may make what it keeps
            self.forget()
            self._wiring = wiring
            with as_recorded(), self.lean.in_place():
                return self.model(**inputs)
        replay = self._replay
        if replay is None:
            try:
                replay = self._record(found, spec)
            except RuntimeError as error:
                self.refusal = (
                    f"a step of {type(self.model).__name__} cannot be recorded: {str(error).partition(chr(10))[0]}"
                )
                return self(**inputs)
        for here, there in zip(self._inputs, found, strict=True):
            if isinstance(here, Tensor):
                here.copy_(there)
        self.replayed += 1
        return replay()

    def forget(self) -> None:
        """Let go of what was recorded."""
        self._inputs, self._buffers, self._replay, self._wiring = [], [], None, ()

    def _record(self, found: list[Any], spec: Any) -> Callable[[], Any]:
        """Capture a step; nothing of it runs on a GPU. Raises ``RuntimeError`` where the model cannot be captured."""
        self._inputs = [x.clone() if isinstance(x, Tensor) else x for x in found]
        arguments = tree_unflatten(self._inputs, spec)

        def step() -> Any:
            with as_recorded(), self.lean.in_place():
                return self.model(**arguments)

        self._replay = _captured(step, self.cache) if self.model.device.type == "cuda" else step
        self.recorded += 1
        return self._replay

    def _layers(self) -> list[Any]:
        """Where the buffers of every layer are, and what else a recorded step relies on."""
        steps = [layer.steps for layer in self.cache.tiered]
        for layer in self.cache.tiered:
            layer.steps.wire(layer.known)
        buffers = [one.buffers for one in steps]
        if len(buffers) != len(self._buffers) or any(a is not b for a, b in zip(buffers, self._buffers, strict=True)):
            self._buffers = buffers
            self._addresses = [_address(t) for one in steps for part in one.operands for t in part]
        relied = [(one.name, one.assume_padding_mask, one.first.data_ptr()) for one in steps]
        return [self._addresses, relied, [_branch(layer) for layer in self.cache.layers]]


def _captured(step: Callable[[], Any], cache: TieredKVCache) -> Callable[[], Any]:
    """``step`` as a CUDA graph that returns what ``step`` returned."""
    lengths = [getattr(layer, "cumulative_length_int", None) for layer in cache.layers]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = step()
    for layer, length in zip(cache.layers, lengths, strict=True):
        if length is not None:  # what was captured has not happened yet
            layer.cumulative_length_int = length

    def replay() -> Any:
        graph.replay()
        for layer in cache.layers:
            _has_stepped(layer)
        return outputs

    return replay


def _kind(value: Any) -> Any:
    """What a recorded step relies on in an argument: all of it, but for the numbers in tensors."""
    return (value.shape, value.dtype, value.stride()) if isinstance(value, Tensor) else value


def _address(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _records(layer: Any) -> bool:
    """Whether the next step of a layer is the same operations on the same memory as the one before."""
    if isinstance(layer, TieredLayer):
        return layer.is_compileable and layer.steps.ready
    return type(layer) in (StaticLayer, StaticSlidingWindowLayer) and layer.is_initialized


def _branch(layer: Any) -> Any:
    """Which way transformers' fixed sliding window goes: it asks the host."""
    return type(layer) is StaticSlidingWindowLayer and layer.cumulative_length_int >= layer.max_cache_len


def _has_stepped(layer: Any) -> None:
    """What a layer's Python would have noted of a step that was replayed."""
    if isinstance(layer, TieredLayer):
        layer.steps.behind = layer.steps.stale = True
    elif type(layer) is StaticSlidingWindowLayer:
        layer.cumulative_length_int += 1
