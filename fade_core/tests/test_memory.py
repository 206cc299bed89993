"""``live_bytes`` and the peak trackers against allocations whose sizes are known."""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from fade_core.support.memory import CachePeak, PeakTracker, live_bytes, live_storages

KIB = 1024


def floats(kib: int) -> Tensor:
    return torch.zeros(kib * KIB // 4)


class Slotted:
    __slots__ = ("__private", "tensor")

    def __init__(self) -> None:
        self.tensor = floats(2)
        self.__private = floats(3)

    def method(self) -> None: ...


@dataclass(frozen=True)
class Record:
    tensor: Tensor
    inner: Any = None


def closure(tensor: Tensor) -> Any:
    return lambda: tensor.sum()


@pytest.mark.parametrize(
    ("build", "kib"),
    [
        (lambda: [floats(1), (floats(2), {"a": floats(4)})], 7),
        (lambda: {floats(1)}, 1),
        (lambda: Record(floats(1), Record(floats(2))), 3),
        (Slotted, 5),
        (lambda: Slotted().method, 5),
        (lambda: closure(floats(3)), 3),
        (lambda: functools.partial(max, floats(1), key=floats(2)), 3),
        (lambda: torch.nn.Linear(16, 16, bias=False), 1),
        (lambda: floats(4)[:10], 4),
        (lambda: floats(4).to("meta"), 0),
        (lambda: torch.eye(8).to_sparse(), 8 * (2 * 8 + 4) / KIB),
    ],
)
def test_every_way_to_hold_a_tensor_is_followed(build: Any, kib: float) -> None:
    assert live_bytes(build()) == kib * KIB


def test_views_of_one_storage_count_once() -> None:
    tensor = floats(8)
    assert live_bytes([tensor, tensor[3:], tensor.view(2, -1), {"again": tensor}]) == 8 * KIB


def test_cycles_end_and_weak_references_are_not_followed() -> None:
    record: dict[str, Any] = {"tensor": floats(1)}
    record["self"] = record
    other = floats(2)
    weak = weakref.WeakValueDictionary({"other": other})
    assert live_bytes([record, weakref.ref(other), weak]) == KIB
    assert other.numel()


def test_excluded_storages_do_not_count() -> None:
    model = torch.nn.Linear(16, 16, bias=False)
    holder = {"model": model, "own": floats(2)}
    assert live_bytes(holder) == 3 * KIB
    assert live_bytes(holder, exclude=model) == 2 * KIB
    assert live_storages(holder, exclude=holder) == {}


def test_dynamic_cache_holds_its_keys_and_values() -> None:
    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.randn(2, 2, 17, 8), torch.randn(2, 2, 17, 8), layer)
    assert live_bytes(cache) == 3 * 2 * (2 * 2 * 17 * 8) * 4


def test_peak_counts_temporaries_that_are_gone() -> None:
    before = floats(64)
    with PeakTracker() as tracker:
        kept = floats(8)
        kept.add_(before[: kept.numel()])
        for _ in range(3):
            temporary = floats(16)
            del temporary
        last = kept + 1
    assert tracker.peak == (8 + 16) * KIB
    assert last.numel() == kept.numel()


def test_stopping_early_ends_the_measurement() -> None:
    with PeakTracker() as tracker:
        small = floats(4)
        tracker.stop()
        large = floats(400)
        tracker.stop()
    assert tracker.peak == 4 * KIB
    assert small.numel() < large.numel()


def test_peak_sees_growth_by_resizing_and_ignores_views() -> None:
    with PeakTracker() as tracker:
        tensor = floats(4)
        views = [tensor[1:], tensor.view(2, -1)]
        assert tracker.peak == 4 * KIB
        tensor = floats(1)
        tensor.resize_(10 * KIB // 4)
        assert tracker.peak >= (4 + 10) * KIB
    assert views


def test_peak_sees_inside_a_tensor_that_dispatches_itself() -> None:
    class Lazy(Tensor):
        """A wrapper that materialises 32 KiB for any operation."""

        @staticmethod
        def __new__(cls) -> Lazy:
            return Tensor._make_wrapper_subclass(cls, (8 * KIB,), dtype=torch.float32)  # type: ignore[attr-defined]

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*(torch.ones(8 * KIB) if isinstance(a, cls) else a for a in args), **(kwargs or {}))

    lazy = Lazy()
    assert live_bytes(lazy) == 0
    with PeakTracker() as tracker:
        total = lazy.sum()
    assert total == 8 * KIB
    assert tracker.peak == 32 * KIB + 4


def test_peak_of_a_model_is_below_what_all_its_outputs_would_take() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(8)))
    x = torch.randn(32, 64)
    with torch.inference_mode(), PeakTracker() as tracker:
        model(x)
    assert tracker.peak == 2 * x.numel() * 4  # one layer's input and output, never all eight


def test_cache_peak_samples_after_each_update_and_restores_it() -> None:
    class Halving(DynamicCache):
        """Keeps only half of what it was given, once the next layer comes."""

        def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            for before in self.layers[:layer]:
                length = key.shape[2] // 2
                before.keys, before.values = before.keys[:, :, :length].clone(), before.values[:, :, :length].clone()
            return super().update(key, value, layer, *args, **kwargs)

    cache = Halving()
    with CachePeak(cache) as tracker:
        for layer in range(4):
            cache.update(torch.randn(1, 1, 16, 8), torch.randn(1, 1, 16, 8), layer)
    one = 2 * 16 * 8 * 4
    assert tracker.peak == 3 * one // 2 + one
    assert "update" not in vars(cache)
