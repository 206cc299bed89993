"""What the host reads back from the device as a layer takes tokens in, counted on a device that is only pretended."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
import torch
from tiny import fresh_seed, tiny_llama
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fade_core import FadeConfig, create_tiered_cache
from fade_core.cache.attention import padding_mask
from fade_core.cache.layer import TieredLayer
from fade_core.cache.layer_state import store_state
from fade_core.cache.manual import assign_layer

SHORT = {"n_sink": 3, "recent_window": 16, "tile": 16}
AGED = {"kind": "position", "budget": 300}
RUNGS = [{"tier": "int4", "capacity": 64}, {"tier": "int2"}]
CONFIGS: dict[str, dict[str, Any]] = {
    "one tier": {"ladder": [{"tier": "int4"}]},
    "shared scales": {"ladder": [{"tier": "int4"}], "keys": {"kind": "uniform", "axis": "channel"}},
    "by age": {"ladder": RUNGS, "policy": AGED},
    "by attention": {"ladder": RUNGS, "policy": {"kind": "h2o", "budget": 300}},
}
PADDING = (0, 21)
STEPS = [1] * 40
CASES = {
    ("one tier", None): [400, 64, *STEPS],
    ("shared scales", None): [400, 64, *STEPS],
    ("by age", None): [400, *STEPS],
    ("by attention", None): [400, *STEPS],
    ("one tier", 1024): [400, 64],  # the room for a cache of fixed size
    ("shared scales", 1024): [400, 64],
}

AWAY = torch.device("meta")
_aten = torch.ops.aten
_READING = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default}


class Away(Tensor):
    """A tensor that says it is on ``AWAY`` and has its data in ``here``."""

    here: Tensor

    @staticmethod
    def of(here: Tensor) -> Away:
        away: Away = torch.Tensor._make_wrapper_subclass(
            Away, here.shape, strides=here.stride(), dtype=here.dtype, device=AWAY
        )
        away.here = here
        return away

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} on a tensor of the pretended device, outside of Device()")


class Device(TorchDispatchMode):
    """Computes what ``Away`` tensors are asked for, and notes in ``reads`` what takes data from them to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = [*_away((args, kwargs))]
        wanted = kwargs.get("device")
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        there = bool(given) if wanted is None else torch.device(wanted) == AWAY
        if func is _aten.copy_.default or func is _aten.index_put.default or func is _aten.index_put_.default:
            there = isinstance(args[0], Away)
        masks = [*_away(args[1])] if func is _aten.index.Tensor else []
        if given and (not there or func in _READING or any(t.dtype == torch.bool for t in masks)):
            frames = [f for f in traceback.extract_stack() if "/fade_core/src/" in f.filename]
            self.reads.append(f"{func}: {frames[-1].line}" if frames else str(func))
        found = func(*_each(_inner, args), **_each(_inner, kwargs)) if given else func(*args, **kwargs)
        if not there:
            return found
        known = {id(t.here): t for t in given}  # what an operation in place gives back

        def outer(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return known[id(value)] if id(value) in known else Away.of(value)

        return _each(outer, found)


def _away(value: Any) -> Iterator[Away]:
    """Tensors of the pretended device in ``value``, however deep."""
    if isinstance(value, Away):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _away(part)
    elif isinstance(value, dict):
        yield from _away([*value.values()])


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """``value`` with ``change`` made to whatever it holds (torch's ``tree_map`` takes as long as all else here)."""
    if isinstance(value, (tuple, list)):
        return type(value)([_each(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _each(change, part) for name, part in value.items()}
    return change(value)


def _inner(value: Any) -> Any:
    return value.here if isinstance(value, Away) else value


class Side:
    """A layer whose tokens are on the host or, counted, on the pretended device."""

    def __init__(self, name: str, device: Device | None, limit: int | None = None) -> None:
        model = tiny_llama(layers=1)
        self.layer: TieredLayer = create_tiered_cache(model, FadeConfig(**SHORT, **CONFIGS[name]), limit).tiered[0]
        self.device, self.reads = device, list[str]()
        self.here = device or contextlib.nullcontext()
        """Around all that is done with the layer: on the host nothing has to look at what is computed."""

    def take(self, keys: Tensor, values: Tensor, padding: Tensor | None = None) -> None:
        """Tokens ``[B, H_kv, Q, D]`` come: what follows attention is counted, the check for NaN before it is not."""
        with self.here:
            self.layer.update(*(Away.of(t.clone()) if self.device else t.clone() for t in (keys, values)))
            before = len(self.device.reads) if self.device else 0
            self.layer.finish_pending(padding)
            self.reads += self.device.reads[before:] if self.device else []

    def state(self) -> dict[str, Tensor]:
        """The window and every store, on the host."""
        with self.here:
            return self._state()

    def _state(self) -> dict[str, Tensor]:
        window = self.layer.held.window
        found = {f"window.{n}": t for n, t in window.state().items()}
        for i, store in enumerate(self.layer.held.stores):
            found |= {f"store{i}.{n}": t for n, t in store_state(store).items()}
        return {n: _inner(t) for n, t in found.items()}


def tokens(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    keys, values = torch.randn((2, len(PADDING), 2, count, 16), generator=generator)
    return keys, values


@pytest.mark.parametrize(("name", "limit"), CASES)
def test_a_prompt_and_steps_are_packed_without_reading_positions_back(
    name: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(fresh_seed())
    monkeypatch.setattr("fade_core.cache.layer.storage_bytes", lambda tensors: 0)  # a pretended tensor has no address
    device = Device()
    with torch.no_grad():
        sides = Side(name, None, limit), Side(name, device, limit)
        for count in CASES[name, limit]:
            keys, values = tokens(count, generator)
            for side in sides:
                side.take(keys, values, torch.tensor(PADDING))
        here, away = (side.state() for side in sides)
    assert not sides[1].reads
    assert_same(here, away)


@pytest.mark.parametrize("limit", [None, 1024])
@pytest.mark.parametrize("name", ["one tier", "by attention"])
def test_steps_that_nobody_looks_at_leave_what_others_do(
    name: str, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Off a CPU tiles leave the window when the next tokens come, and the host goes by what it knows to be reserved."""
    seed = fresh_seed()
    generator, random = torch.Generator().manual_seed(seed), Random(seed)
    monkeypatch.setattr("fade_core.cache.layer.storage_bytes", lambda tensors: 0)
    device = Device()
    with torch.no_grad():
        sides = Side(name, None, limit), Side(name, device, limit)
        for count in (random.randint(30, 60), *(random.choice((1, 1, 1, 1, 1, 7, 32)) for _ in range(60))):
            keys, values = tokens(count, generator)
            for side in sides:
                side.take(keys, values)
            windows = [_inner(side.layer.known.window.numbers.device) for side in sides]  # without telling the host
            assert torch.equal(*windows), "attention reads other tokens in full precision"
            for side in sides:
                with side.here:
                    side.layer.rest()
        for side in sides:
            with side.here:
                side.layer.settle()
        here, away = (side.state() for side in sides)
    assert_same(here, away)


def test_positions_are_read_back_only_while_tokens_moved_by_hand_leave_gaps(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(fresh_seed())
    monkeypatch.setattr("fade_core.cache.layer.storage_bytes", lambda tensors: 0)
    with Device() as device, torch.no_grad():
        sides = Side("one tier", None), Side("one tier", device)
        sink, recent = torch.tensor(PADDING) + 1, torch.tensor([297, 297])
        for gone, gaps in ((sink, False), (recent, True)):
            keys, values = tokens(100, generator)
            for side in sides:
                side.take(keys, values, torch.tensor(PADDING))
            for side in sides:
                wanted = _inner(side.layer.held.tier_map()).clone()
                wanted.scatter_(2, gone[:, None, None].expand(-1, wanted.shape[1], -1), -1)
                assign_layer(side.layer, Away.of(wanted) if side.device else wanted)
                side.take(keys, values)
            assert bool(sides[1].reads) == gaps
            assert_same(*(side.state() for side in sides))
    positions = sides[0].layer.held.stores[0].live_positions()
    for row, padding in enumerate(PADDING):
        held = torch.cat([positions[row, 0], sides[0].layer.held.window.live_positions()[row, 0]]).tolist()
        missing = set(range(padding, 400)) - set(held)
        assert missing == {padding + 1, 297}


def assert_same(here: dict[str, Tensor], away: dict[str, Tensor]) -> None:
    assert here.keys() == away.keys()
    assert all(torch.equal(held, away[n]) for n, held in here.items())


def test_a_prompt_without_padding_is_known_to_have_none() -> None:
    model = tiny_llama(layers=1)
    with create_tiered_cache(model, FadeConfig(**SHORT)), Device() as device:
        assert padding_mask(2, 5, 5, config=model.config, device=AWAY) is None
        assert not device.reads
        assert padding_mask(2, 5, 9, 4, config=model.config, device=AWAY) is not None
        assert not device.reads
        padding_mask(2, 5, 5, config=model.config, device=AWAY, attention_mask=Away.of(torch.ones(2, 5)))
        assert device.reads  # the test sees what is read
