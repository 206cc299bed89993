"""What FADE's attention would do to a model, found before a cache is made: by its code and by a pass of a few tokens."""

from __future__ import annotations

import contextlib
import inspect
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from transformers import DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from fade_core.cache.attachment import every_config, named
from fade_core.errors import UnsupportedModelError

CHECK = "fade-check"
"""The name of the attention that only watches."""

_TOKENS = 4
_KNOWN_TENSORS = {"position_ids", "cache_position", "s_aux"}
"""Tensors that attention may be given beside queries, keys, values and the mask, with no effect or one that FADE knows."""


_FAILURES = (TypeError, ValueError, AttributeError, LookupError, RuntimeError)


@dataclass
class Findings:
    """What was found of a model.

    Attributes:
        reason: why FADE's attention cannot stand in for the model's own; empty if it can.
        unfed: layers of the cache that a pass of text alone leaves empty (those of images, say).
    """

    reason: str = ""
    unfed: frozenset[int] = frozenset()


_found: weakref.WeakKeyDictionary[PreTrainedModel, Findings] = weakref.WeakKeyDictionary()


def check_model(model: PreTrainedModel, layers: frozenset[int]) -> Findings:
    """Whether FADE's attention can stand in for that of ``model``; looked at once a model.

    Args:
        model: a decoder-only model.
        layers: those of the cache that hold all tokens.

    Raises:
        UnsupportedModelError: if the model works, but not with a cache that it is given.
    """
    if model in _found:
        return _found[model]
    reason = _untaken(model) or _branch_on_name(model, layers)
    seen = _watched(model, layers, CHECK if not reason else None)
    if seen is None:
        return Findings(reason)
    _found[model] = Findings(reason or next(iter(seen.reasons), ""), layers - seen.fed)
    return _found[model]


# --- by what it says ---


def _untaken(model: PreTrainedModel) -> str:
    """Why a model does not take the attention that it is told to; empty if it does."""
    before = [(config, config._attn_implementation_internal) for config in every_config(model)]
    try:
        model.set_attn_implementation(CHECK)
        took = model.config.get_text_config(decoder=True)._attn_implementation == CHECK
    except (ValueError, ImportError) as error:
        return f"it takes no other attention ({error})"
    finally:
        for one, own in before:
            one._attn_implementation_internal = own
    return "" if took else "its attention is code of its own, which takes no attn_implementation"


# --- by its code ---


def _branch_on_name(model: PreTrainedModel, layers: frozenset[int]) -> str:
    """A branch of an attention module on the attention's name, which takes FADE's for neither "sdpa" nor "eager"."""
    for kind in dict.fromkeys(type(m) for m in model.modules() if getattr(m, "layer_idx", None) in layers):
        for name, function in vars(kind).items():
            if not inspect.isfunction(function):
                continue
            for code in _codes(inspect.unwrap(function).__code__):
                if "_attn_implementation" in code.co_names and "sdpa" in _strings(code.co_consts):
                    return f"{kind.__name__}.{name} does something of its own where attention is called 'sdpa'"
    return ""


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _strings(constants: Any) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, (tuple, frozenset)):
            yield from _strings(constant)


# --- by a pass ---


@dataclass
class _Sightings:
    """What became of the keys and values of each layer, during a pass."""

    fed: set[int] = field(default_factory=set)
    attended: set[int] = field(default_factory=set)
    reasons: list[str] = field(default_factory=list)


class _Watched(Tensor):
    """Keys or values as a cache returned them: says which operation reads them."""

    plain: Tensor
    layer: int
    sightings: _Sightings

    @staticmethod
    def __new__(cls, plain: Tensor, layer: int, sightings: _Sightings) -> _Watched:
        made: _Watched = Tensor._make_wrapper_subclass(cls, plain.shape, dtype=plain.dtype, device=plain.device)
        made.plain, made.layer, made.sightings = plain, layer, sightings
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"_Watched(layer {self.layer}, shape={tuple(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        def plain(value: Any) -> Any:
            if not isinstance(value, _Watched):
                return value
            operation = func.overloadpacket.__name__
            value.sightings.reasons.append(
                f"its layer {value.layer} works on keys or values that it has stored ({operation}) before attention sees them"
            )
            return value.plain

        return func(*tree_map(plain, args), **tree_map(plain, kwargs or {}))


class _WatchedCache(DynamicCache):
    """A ``DynamicCache`` that says what becomes of what it returns."""

    def __init__(self, config: Any, layers: frozenset[int]) -> None:
        super().__init__(config=config)
        self.watched, self.sightings = layers, _Sightings()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self.watched:
            return found
        self.sightings.fed.add(layer_idx)
        return tuple(_Watched(one, layer_idx, self.sightings) for one in found)


def _watch(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """In the place of attention: notes what it is given; its output ``[B, Q, H_q, D]`` is 0."""
    if isinstance(key, _Watched):
        sightings, layer = key.sightings, key.layer
        sightings.attended.add(layer)
        unknown = [n for n, v in given.items() if isinstance(v, Tensor) and n not in _KNOWN_TENSORS]
        if unknown:
            sightings.reasons.append(f"its layer {layer} steers attention by {unknown[0]}, which FADE's does not know")
        if not isinstance(value, _Watched) or value.layer != layer:
            sightings.reasons.append(f"its layer {layer} attends to values other than those that it has stored")
    shape = (query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    return query.new_zeros(shape), None


AttentionInterface.register(CHECK, _watch)
AttentionMaskInterface.register(CHECK, sdpa_mask)


def _watched(model: PreTrainedModel, layers: frozenset[int], name: str | None) -> _Sightings | None:
    """What a pass of a few tokens shows, its attention called ``name``, or as it is; ``None`` if it takes more than tokens.

    Raises:
        UnsupportedModelError: if the pass needs nothing but to be without a cache.
    """
    text = model.config.get_text_config(decoder=True)
    special = {v for n, v in vars(text).items() if n.endswith(("_token_id", "_token_index")) and type(v) is int}
    ordinary = [token for token in range(min(512, text.vocab_size)) if token not in special][-_TOKENS:]
    ids = torch.tensor([ordinary], device=model.device)
    devices = [model.device] if model.training and model.device.type == "cuda" else []
    # a model in training draws random numbers, which are none of a sampler's
    with torch.no_grad(), torch.random.fork_rng(devices, enabled=model.training):
        cache = _WatchedCache(text, layers)
        failure = "it leaves the cache that it is given empty"
        try:
            with named(model, name) if name else contextlib.nullcontext():
                model(input_ids=ids, past_key_values=cache, use_cache=True)
            if (seen := cache.sightings).fed:
                missed = sorted(seen.fed - seen.attended)
                if missed:
                    seen.reasons.insert(
                        0, f"its layer {missed[0]} does not call the attention that its configuration names"
                    )
                return seen
        except _FAILURES as error:
            failure = f"{type(error).__name__}: {error}".partition("\n")[0]
        if name:  # it may be the name that it fails by
            found = _watched(model, layers, None)
            if found is not None:
                found.reasons.insert(0, f"its pass fails with an attention that is not its own ({failure})")
            return found
        if (
            model.training or model.device.type == "meta"
        ):  # checkpoints of gradients go without a cache; no weights, no pass
            return None
        try:
            model(input_ids=ids)
        except _FAILURES:  # it takes more than tokens: what it does with a cache is seen when it gets them
            return None
    raise UnsupportedModelError(
        f"{type(model).__name__} does not work with a cache that it is given ({failure}); generate without FADE"
    )
