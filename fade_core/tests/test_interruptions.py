"""A pass that ends in its middle, wherever that is: the cache is as before it, or the next use says what is lost."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, fresh_seed, tiny_llama
from torch import Tensor

import fade_core
from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.errors import InputError
from fade_core.interfaces import Event, LayerView, TelemetrySink

SHORT = {"n_sink": 2, "recent_window": 16, "tile": 16}
TOKENS = {"kind": "uniform", "axis": "token"}
CONFIGS: dict[str, dict[str, Any]] = {
    "keeps all": {},
    "evicts": {"keys": TOKENS, "policy": {"kind": "h2o", "budget": 0.6, "every": 3}},
    "two tiers": {"keys": TOKENS, "policy": {"kind": "h2o", "budget": 0.9, "every": 3},
                  "ladder": [{"tier": "int4", "capacity": 32}, {"tier": "int2"}]},
}  # fmt: skip
INSIDE = str(Path(fade_core.__file__).parent)
PROMPT, CHUNK, AFTER = 79, 40, 6


@contextmanager
def ends_at(call: int, error: type[BaseException] | None) -> Iterator[list[str]]:
    """Raise ``error`` when a function of FADE's is called for the ``call``-th time; gives the names of those called."""
    called: list[str] = []

    def trace(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(INSIDE):
            called.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}")
            if error is not None and len(called) == call:
                sys.settrace(None)
                raise error("ended here")

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield called
    finally:
        sys.settrace(before)


class Talk:
    """A cache after a prompt and four tokens, and what is said next."""

    def __init__(self, config: dict[str, Any], length: int | None, count: int, seed: int) -> None:
        self.model = tiny_llama(layers=3)
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(VOCABULARY, (2, PROMPT + 4 + count + AFTER), generator=generator)
        self.cache: TieredKVCache = create_tiered_cache(self.model, FadeConfig(**SHORT, **config), length)
        self.at, self.count = 0, count
        for tokens in (PROMPT, 1, 1, 1, 1):
            self.said(tokens)

    @torch.no_grad()
    def said(self, count: int) -> Tensor:
        part = self.ids[:, self.at : self.at + count]
        logits: Tensor = self.model(part, past_key_values=self.cache, use_cache=True).logits[:, -1]
        self.at += count
        return logits

    def rest(self) -> Tensor:
        """Logits ``[AFTER + 1, B, V]`` of the pass that may be interrupted, and of the tokens after it."""
        return torch.stack([self.said(self.count), *(self.said(1) for _ in range(AFTER))])


def what_is_lost(cache: TieredKVCache) -> str:
    """What the next use of a cache says, or nothing."""
    try:
        cache.conclude()
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("count", [1, CHUNK])
@pytest.mark.parametrize("length", [None, 256])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_that_ends_anywhere(name: str, length: int | None, count: int) -> None:
    seed = fresh_seed()
    random, right = Random(seed), Talk(CONFIGS[name], length, count, seed).rest()
    whole = Talk(CONFIGS[name], length, count, seed)
    with ends_at(0, None) as called:
        whole.said(count)
    for call in random.sample(range(1, len(called) + 1), 6):
        error = random.choice([KeyboardInterrupt, torch.OutOfMemoryError, RuntimeError])
        talk = Talk(CONFIGS[name], length, count, seed)
        began = talk.cache.get_seq_length()
        try:
            with ends_at(call, error) as made:
                talk.said(count)
        except error:
            pass
        else:
            assert len(made) < call, "somebody kept the error to himself"
            continue  # what was kept from before took fewer calls
        lengths = {layer.get_seq_length() for layer in talk.cache.layers}
        where = f"{error.__name__} at call {call}, {called[call - 1]}: lengths {lengths}"
        if lost := what_is_lost(talk.cache):
            assert "interrupted" in lost, where
            assert "emptied" in lost, where
            assert talk.cache.get_seq_length() == 0, where
            continue
        assert {layer.get_seq_length() for layer in talk.cache.layers} <= {began, began + count}, where
        if talk.cache.get_seq_length() == began:
            assert torch.equal(talk.rest(), right), where
        else:
            talk.at += count
            assert torch.equal(torch.stack([talk.said(1) for _ in range(AFTER)]), right[1:]), where


@pytest.mark.parametrize("length", [None, 256])
def test_lengths_do_not_count_a_pass_that_was_interrupted(length: int | None) -> None:
    """A model asks for the length before anything else, and numbers its positions by it."""
    talk = Talk({}, length, 1, 0)
    began = talk.cache.get_seq_length()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = talk.model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        talk.said(1)
    hook.remove()
    assert talk.cache.get_seq_length() == began
    assert [layer.get_seq_length() for layer in talk.cache.layers] == [began] * 3
    assert torch.equal(talk.rest(), Talk({}, length, 1, 0).rest())


def test_a_prompt_that_was_interrupted_leaves_an_empty_cache() -> None:
    talk = Talk({}, None, 1, 0)
    right = talk.rest()
    talk.cache.reset()
    talk.at = 0
    with pytest.raises(KeyboardInterrupt), ends_at(300, KeyboardInterrupt):
        talk.said(PROMPT)
    assert talk.cache.get_seq_length() == 0
    for tokens in (PROMPT, 1, 1, 1, 1):
        talk.said(tokens)
    assert torch.equal(talk.rest(), right)


@pytest.mark.parametrize("answer", [ValueError("no idea"), torch.tensor(1.0)], ids=["raises", "wrong shape"])
def test_a_policy_that_fails_costs_at_most_what_is_said(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk(CONFIGS["evicts"], None, CHUNK, 0)

    def score(view: LayerView) -> Tensor:
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(talk.cache.policy, "score", score)
    with pytest.raises(Exception, match=r"no idea|shape"):
        talk.rest()
    monkeypatch.undo()
    if lost := what_is_lost(talk.cache):
        assert "interrupted while" in lost
        assert talk.cache.get_seq_length() == 0
    else:
        held = {layer.get_seq_length() for layer in talk.cache.layers}
        assert len(held) == 1
        talk.at = held.pop()
        talk.said(1)


class Failing(TelemetrySink):
    """Fails at its second event."""

    def __init__(self) -> None:
        self.told = 0

    def emit(self, event: Event) -> None:
        self.told += 1
        if self.told == 2:
            raise OSError("no space left on device")


def test_a_sink_that_fails_is_told_nothing_more_and_ends_no_pass() -> None:
    talk, sink = Talk(CONFIGS["evicts"], None, 1, 0), Failing()
    talk.cache.sinks.append(sink)
    with pytest.warns(UserWarning, match=r"Failing failed \(OSError: no space left on device\)"):
        found = talk.rest()
    assert sink.told == 2
    assert sink not in talk.cache.sinks
    assert torch.equal(found, Talk(CONFIGS["evicts"], None, 1, 0).rest())


def test_two_threads_need_two_caches() -> None:
    """The second is refused by name, and the first goes on as if nothing had been."""
    talk, inside, tried = Talk({}, None, 1, 0), threading.Event(), threading.Event()
    found, right = list[Tensor](), Talk({}, None, 1, 0).rest()

    def wait(*_: Any) -> None:
        inside.set()
        assert tried.wait(60)

    hook = talk.model.model.layers[1].mlp.register_forward_hook(wait)
    first = threading.Thread(target=lambda: found.append(talk.said(1)))
    first.start()
    assert inside.wait(60)
    hook.remove()
    with pytest.raises(InputError, match=r"another thread is under way.*copy\.deepcopy"), torch.no_grad():
        talk.model(talk.ids[:, :1], past_key_values=talk.cache, use_cache=True)
    tried.set()
    first.join(60)
    found += [talk.said(1) for _ in range(AFTER)]
    assert torch.equal(torch.stack(found), right)


@pytest.mark.parametrize("way", [pickle.dumps, copy.copy, lambda cache: torch.save(cache, io.BytesIO())])
def test_a_cache_is_no_object_to_pickle(way: Callable[[Any], Any]) -> None:
    with pytest.raises(InputError, match=r"save\(path\).*TieredKVCache\.load"):
        way(Talk({}, None, 1, 0).cache)
