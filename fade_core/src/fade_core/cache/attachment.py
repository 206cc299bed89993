"""A model's attention is FADE's while a forward pass carries a FADE cache, and the model's own at all other times."""

from __future__ import annotations

import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fade_core.cache.passes import PassControl

NAME = "fade"

_IMPLEMENTATION = "_attn_implementation_internal"
_ATTACHMENT = "_fade_attachment"


@dataclass(eq=False)
class Attachment:
    """What a model needs to run FADE's attention in some passes; a copy of the model has one of its own.

    Attributes:
        configs: where the model's modules read the name of their attention.
        own: the names there outside FADE's passes, as of the pass under way.
        passes: FADE's passes under way, of all threads.
    """

    configs: list[PreTrainedConfig]
    own: list[str] = field(default_factory=list)
    passes: int = 0

    def enter(self) -> None:
        """The model's attention is FADE's from here on."""
        if not self.passes:
            self.own = [getattr(config, _IMPLEMENTATION) for config in self.configs]
            for config in self.configs:
                setattr(config, _IMPLEMENTATION, NAME)
        self.passes += 1

    def leave(self) -> None:
        """The model's own is back, unless other passes are under way."""
        self.passes -= 1
        if not self.passes:
            for config, own in zip(self.configs, self.own, strict=True):
                setattr(config, _IMPLEMENTATION, own)

    def own_name(self, config: PreTrainedConfig) -> str | None:
        """What ``config`` names outside FADE's passes, while one is under way."""
        for known, own in zip(self.configs, self.own, strict=False):
            if known is config and self.passes:
                return own
        return None


class _Pass(NamedTuple):
    module: PreTrainedModel
    attached: bool


class _Passes(threading.local):
    """The passes with a FADE cache that this thread is in, the outermost first."""

    def __init__(self) -> None:
        self.stack: list[_Pass] = []


_passes = _Passes()
_lock = threading.Lock()
_known: weakref.WeakValueDictionary[int, Attachment] = weakref.WeakValueDictionary()
"""Attachments by the ids of their configurations."""


def attach(model: PreTrainedModel) -> None:
    """Run passes of ``model`` that carry an attached FADE cache with FADE's attention.

    The hooks that see to it do nothing in other passes, and stay: steps that were compiled for one cache run for the next.
    """
    with _lock:
        if hasattr(model, _ATTACHMENT):  # a copy of a model has its own already
            attachment: Attachment = getattr(model, _ATTACHMENT)
        else:
            attachment = Attachment(configs_of_attention(model))
            for part in _parts(model):
                setattr(part, _ATTACHMENT, attachment)
                part.register_forward_pre_hook(_begin, with_kwargs=True)
                part.register_forward_hook(_end, with_kwargs=True, always_call=True)
        _known.update({id(config): attachment for config in attachment.configs})


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The modules of ``model`` that somebody may call with a cache: itself and the decoder inside it."""
    configs = {id(config) for config in configs_of_attention(model)}
    return [part for part in model.modules() if isinstance(part, PreTrainedModel) and id(part.config) in configs]


def configs_of_attention(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """Where the decoder's modules read the name of their attention; vision towers have configurations of their own."""
    text = model.config.get_text_config(decoder=True)
    found = {id(config): config for config in (model.config, text)}
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(config) is type(text):
            found[id(config)] = config
    return list(found.values())


def every_config(model: PreTrainedModel) -> list[PreTrainedConfig]:
    """All configurations of ``model``, those of its parts included."""
    found: dict[int, PreTrainedConfig] = {}
    todo = [config for m in model.modules() if isinstance(config := getattr(m, "config", None), PreTrainedConfig)]
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            parts = (getattr(config, name, None) for name in config.sub_configs)
            todo += [part for part in parts if isinstance(part, PreTrainedConfig)]
    return list(found.values())


@contextmanager
def named(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Inside the block the decoder's configurations name another attention."""
    before = [(config, getattr(config, _IMPLEMENTATION)) for config in configs_of_attention(model)]
    try:
        for config, _ in before:
            setattr(config, _IMPLEMENTATION, name)
        yield
    finally:
        for config, own in before:
            setattr(config, _IMPLEMENTATION, own)


# --- hooks: module-level functions, so that copies of a model, pickled ones too, have them ---


def _begin(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A call of the model, or of the decoder inside it, begins."""
    cache = _carried(args, kwargs)
    if torch.compiler.is_compiling():
        if cache is not None:
            getattr(module, _ATTACHMENT).enter()
        return
    if any(one.module is module for one in _passes.stack):
        _abandon()  # an interrupt ended it: no model calls itself
    if cache is None:
        return
    outer = _passes.stack[-1].attached if _passes.stack else None
    attached = _keeps_weights_out(module, cache, kwargs) if outer is None else outer
    if attached:
        with _lock:
            getattr(module, _ATTACHMENT).enter()
    cache.in_model = attached
    _passes.stack.append(_Pass(module, attached))


def _end(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """It ends, by an error too."""
    if torch.compiler.is_compiling():
        if _carried(args, kwargs) is not None:
            getattr(module, _ATTACHMENT).leave()
    elif _passes.stack and _passes.stack[-1].module is module:
        _leave(_passes.stack.pop())
        cache = _carried(args, kwargs)
        if cache is not None:
            cache.in_model = False


def _leave(one: _Pass) -> None:
    if one.attached:
        with _lock:
            getattr(one.module, _ATTACHMENT).leave()


def _abandon() -> None:
    while _passes.stack:
        _leave(_passes.stack.pop())


def _carried(args: tuple[Any, ...], kwargs: dict[str, Any]) -> PassControl | None:
    """The cache of a call, if it is one of FADE's that wants FADE's attention."""
    for given in (kwargs.get("past_key_values"), *args):
        if isinstance(given, PassControl):
            return given if given.attached else None
    return None


def _keeps_weights_out(module: PreTrainedModel, cache: PassControl, kwargs: dict[str, Any]) -> bool:
    """Whether a pass runs FADE's attention, which forms no weights; where they are asked for, eager attention may do it."""
    text = module.config.get_text_config(decoder=True)
    asked = kwargs.get("output_attentions")
    if not (text.output_attentions if asked is None else asked):
        return True
    if text._attn_implementation != "eager":
        found = f"{text._attn_implementation!r} attention forms no weights; model.set_attn_implementation('eager') does"
    elif any(layer.plan.ladder.bounded or layer.plan.learners or layer.max_length for layer in cache.tiered):
        found = (
            "this cache needs FADE's attention, which forms none (it may evict tokens, has a fixed size, or its quantizers "
            "learn from the prompt); pass a DynamicCache, or take no max_cache_len and a configuration without budget"
        )
    else:
        warnings.warn(
            "output_attentions=True: the model's eager attention runs in this pass, over all tokens dequantized; it is slow, "
            "and its weights are those of the compressed cache. Pass a DynamicCache for the uncompressed ones.",
            stacklevel=2,
        )
        return False
    warnings.warn(f"output_attentions=True: the output has no attention weights: {found}", stacklevel=2)
    return True


# --- other threads' passes of the same model ---


def own_name(config: Any) -> str | None:
    """The attention that ``config`` names by rights, if it names FADE's only because another thread is in a pass of FADE's."""
    if torch.compiler.is_compiling() or _passes.stack:
        return None
    return replaced_name(config)


def replaced_name(config: Any) -> str | None:
    """The attention that FADE's stands in for, in a pass of a model with this ``config``."""
    return _known[id(config)].own_name(config) if id(config) in _known else None


def own_attention(module: torch.nn.Module) -> Callable[..., Any] | None:
    """The attention function that a module runs by rights, if it runs FADE's only because of another thread."""
    own = own_name(getattr(module, "config", None))
    if own is None or own == NAME:
        return None
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(own, eager)
    return found
