"""What a cache holds, in bytes: by layer, tier and kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import Cache

from fade_core.cache.layer import TieredLayer
from fade_core.support.memory import StorageKey, live_storages


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one kind of tensor.

    Attributes:
        layer: layer index, -1 for what all layers share.
        tier: tier name, "fp16" for sinks and window, "other" for layers that FADE leaves to transformers and for what
            belongs to no tier (a learned policy's weights).
        kind: "keys", "values", "k.codes4", "v.meta", "positions", "statistic.mass", ...
        nbytes: bytes of the storage.
    """

    layer: int
    tier: str
    kind: str
    nbytes: int


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that a cache really holds.

    Attributes:
        rows: one a storage.
        baseline: bytes of an uncompressed cache of the same tokens in the model's dtype.
        baseline16: the same at 16 bits an element, whatever the model's dtype.
        tokens: logical length.
    """

    rows: tuple[MemoryRow, ...]
    baseline: int
    baseline16: int
    tokens: int

    @property
    def total(self) -> int:
        """Bytes of all live tensors."""
        return sum(row.nbytes for row in self.rows)

    def by(self, field: str) -> dict[str, int]:
        """Bytes summed by "layer", "tier" or "kind"."""
        sums: dict[str, int] = {}
        for row in self.rows:
            key = str(getattr(row, field))
            sums[key] = sums.get(key, 0) + row.nbytes
        return sums

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return {
            "total": self.total,
            "baseline": self.baseline,
            "baseline16": self.baseline16,
            "tokens": self.tokens,
            "tiers": self.by("tier"),
            "kinds": self.by("kind"),
            "layers": self.by("layer"),
        }


def measure(cache: Cache) -> MemoryReport:
    """The report of a cache: every storage counted once, where it is first met."""
    rows: list[MemoryRow] = []
    seen: set[StorageKey] = set()
    baseline = baseline16 = 0
    for index, layer in enumerate(cache.layers):
        if not isinstance(layer, TieredLayer):
            held = _unseen(layer, seen)
            if held:
                rows.append(MemoryRow(index, "other", "tensors", held))
            baseline += held
            baseline16 += held
            continue
        for name, tensor in layer.tensors().items():
            storage = tensor.untyped_storage()
            key = (tensor.device, storage.data_ptr())
            if not storage.nbytes() or key in seen:
                continue
            seen.add(key)
            tier, kind = name.split("/", 1)
            rows.append(MemoryRow(index, tier, kind, storage.nbytes()))
        if layer.is_initialized:
            window = layer.held.window
            elements = (
                layer.held.rows * layer.held.heads * layer.logical * (window.keys.shape[3] + window.values.shape[3])
            )
            baseline += elements * layer.dtype.itemsize
            baseline16 += elements * 2
    shared = _unseen(cache, seen)
    if shared:
        rows.append(MemoryRow(-1, "other", "shared", shared))
    return MemoryReport(tuple(rows), baseline, baseline16, cache.get_seq_length())


def _unseen(owner: object, seen: set[StorageKey]) -> int:
    """Bytes reachable from ``owner`` that were not ``seen`` before; they are now."""
    new = {key: nbytes for key, nbytes in live_storages(owner).items() if key not in seen}
    seen.update(new)
    return sum(new.values())
