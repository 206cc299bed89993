"""Measuring memory: bytes that an object really holds, and the peak while something runs."""

from __future__ import annotations

import functools
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from types import TracebackType

_NOT_FOLLOWED = (
    *(types.NoneType, str, bytes, int, float, complex, type, types.ModuleType, torch.dtype, torch.device),
    *(weakref.ref, weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary),
)

StorageKey = tuple[torch.device, int]


def live_storages(obj: object, exclude: object = None) -> dict[StorageKey, int]:
    """Bytes of every tensor storage reachable from ``obj``, each storage once.

    Attributes, slots, containers, closures, bound methods and partials are followed; classes, modules and weak
    references are not. A tensor counts with its whole storage: a view of ten elements keeps all of it alive.

    Args:
        obj: anything: a cache, a layer, a list of tensors.
        exclude: an object whose storages do not count (the model, if the cache points to it).
    """
    skipped = live_storages(exclude) if exclude is not None else {}
    pairs = (pair for tensor in _tensors(obj) for pair in _storages(tensor))
    return {key: nbytes for key, nbytes in pairs if key not in skipped}


def live_bytes(obj: object, exclude: object = None) -> int:
    """Bytes of all tensor storages reachable from ``obj`` (see ``live_storages``)."""
    return sum(live_storages(obj, exclude).values())


def storage_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the storages of these tensors, each storage once; quicker than ``live_bytes``, which searches for them."""
    storages = [tensor.untyped_storage() for tensor in tensors.values()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _storages(tensor: Tensor) -> Iterator[tuple[StorageKey, int]]:
    if tensor.device.type == "meta":
        return
    if tensor.layout is not torch.strided:
        parts = (tensor.indices(), tensor.values()) if tensor.layout is torch.sparse_coo else ()
        for part in parts:
            yield from _storages(part)
        return
    try:
        storage = tensor.untyped_storage()
        address, nbytes = storage.data_ptr(), storage.nbytes()
    except (NotImplementedError, RuntimeError):  # a wrapper subclass has no storage of its own
        return
    if address and nbytes:
        yield (tensor.device, address), nbytes


def _tensors(root: object) -> Iterator[Tensor]:
    seen: set[int] = set()
    kept: list[object] = []  # ids stay unique only while the objects live
    known: dict[type, tuple[Callable[[Any], Iterable[object]], tuple[str, ...]] | None] = {}
    stack = [root]
    while stack:
        obj = stack.pop()
        cls = type(obj)
        if cls not in known:
            known[cls] = None if issubclass(cls, _NOT_FOLLOWED) else (_contents_of(cls), _slots(cls))
        found = known[cls]
        if found is None or id(obj) in seen:
            continue
        seen.add(id(obj))
        kept.append(obj)
        if isinstance(obj, Tensor):
            yield obj
        contents, slots = found
        stack.extend(contents(obj))
        attributes = getattr(obj, "__dict__", None)
        if isinstance(attributes, dict) and cls is not types.FunctionType:
            stack.extend(attributes.values())
        stack.extend(getattr(obj, slot, None) for slot in slots)


def _contents_of(cls: type) -> Callable[[Any], Iterable[object]]:
    """What gives an object's contents, attributes and slots aside."""
    if issubclass(cls, Mapping):
        return lambda obj: [*obj.keys(), *obj.values()]
    if issubclass(cls, (list, tuple, set, frozenset, deque)):
        return lambda obj: obj
    if issubclass(cls, types.FunctionType):
        return _enclosed
    if issubclass(cls, types.MethodType):
        return lambda obj: (obj.__self__, obj.__func__)
    if issubclass(cls, functools.partial):
        return lambda obj: (obj.func, obj.args, obj.keywords)
    return lambda obj: ()


def _enclosed(function: types.FunctionType) -> Iterator[object]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # an empty cell
            continue
    yield function.__defaults__


def _slots(cls: type) -> tuple[str, ...]:
    found: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        found += [
            _mangled(base, slot)
            for slot in ((slots,) if isinstance(slots, str) else slots)
            if slot not in ("__dict__", "__weakref__")
        ]
    return tuple(found)


def _mangled(cls: type, name: str) -> str:
    private = name.startswith("__") and not name.endswith("__")
    return f"_{cls.__name__.lstrip('_')}{name}" if private else name


class PeakTracker:
    """Highest number of tensor bytes alive inside the ``with`` block, above what was alive when it began.

    On CUDA this is the allocator's own figure; elsewhere a dispatch mode watches every storage that an operation
    returns until it dies. Memory inside one operation (a library's workspace) is not seen there, and each operation
    takes some 10 us longer: do not time what is tracked.

    Args:
        device: where to measure.

    Attributes:
        peak: bytes, 0 before the block; final after it.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._mode = _AllocationMode()
        self._start = 0
        self._cuda_peak = 0
        self._running = False

    @property
    def peak(self) -> int:
        """Bytes at the highest point so far."""
        if self.device.type != "cuda":
            return self._mode.peak
        return max(self._cuda_peak, 0)

    def stop(self) -> None:
        """End the measurement before the block does; calling it again does nothing."""
        if not self._running:
            return
        self._running = False
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self._cuda_peak = torch.cuda.max_memory_allocated(self.device) - self._start
        else:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __enter__(self) -> Self:
        self._running = True
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device)
        else:
            self._mode.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class _AllocationMode(TorchDispatchMode):
    """Counts the storages that operations return, until a finalizer sees each one die."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(_is_wrapper(leaf) for leaf in tree_leaves((args, kwargs))):
            return NotImplemented  # its own dispatch runs first; the operations inside it come back here
        known = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout is torch.strided and leaf.device.type != "meta":
                self._record(leaf, known)
        return out

    def _record(self, tensor: Tensor, known: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        before = self._sizes.get(key)
        if before is None:
            if key in known:
                return  # a view or an in-place result of something that was alive before
            self._sizes[key] = (weakref.ref(storage, self._finalizer(key)), nbytes)
        elif before[1] != nbytes:
            self._sizes[key] = (before[0], nbytes)
        else:
            return
        self.live += nbytes - (before[1] if before else 0)
        self.peak = max(self.peak, self.live)

    def _finalizer(self, key: int) -> Callable[[weakref.ref[Any]], None]:
        def gone(_: weakref.ref[Any]) -> None:
            entry = self._sizes.pop(key, None)
            if entry is not None:
                self.live -= entry[1]

        return gone


def _is_wrapper(leaf: object) -> bool:
    if not isinstance(leaf, Tensor) or type(leaf) in (Tensor, torch.nn.Parameter):
        return False
    return "__torch_dispatch__" in {name for cls in type(leaf).__mro__[: -len(Tensor.__mro__)] for name in vars(cls)}


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else 0


class CachePeak:
    """Highest ``live_bytes`` of a cache, sampled right after each of its ``update`` calls inside the ``with`` block.

    That is the moment when the new layer's full-precision K/V sits beside whatever the layers before it keep: the
    peak that compressing layer by layer is meant to bound.

    Args:
        cache: any object with ``update(key, value, layer_index, ...)``, as transformers' caches have.
        exclude: as in ``live_storages``.

    Attributes:
        peak: bytes.
    """

    def __init__(self, cache: Any, exclude: object = None) -> None:
        self.cache, self.exclude = cache, exclude
        self.peak = 0

    def __enter__(self) -> Self:
        original = self.cache.update

        @functools.wraps(original)
        def update(*args: Any, **kwargs: Any) -> Any:
            returned = original(*args, **kwargs)
            held = live_storages([self.cache, returned], self.exclude)
            self.peak = max(self.peak, sum(held.values()))
            return returned

        self.cache.update = update
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.cache.update
        self.peak = max(self.peak, live_bytes(self.cache, self.exclude))
