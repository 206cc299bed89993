"""What a step reads and writes of a layer: every tensor by its name, and which tokens go where."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from fade_core.errors import InputError
from fade_core.eviction.query_moments import QueryMoments
from fade_core.interfaces import Tier
from fade_core.storage.slots import under
from fade_core.storage.tier_store import TierStore
from fade_core.storage.tile_view import TileView
from fade_core.storage.window import Window

LOGICAL, NONFINITE, ODD_MASK = 0, 1, 2
"""What the three ``counters`` count: tokens seen, tokens that were not finite, steps whose mask said more than it may."""

MOST_TOKENS = 32
"""Tokens a row that one call takes in."""


_NOTE = r"(shift|statistic\..+)"
_OPERANDS = {
    "append": (
        rf"keys|values|positions|lengths|counters|{_NOTE}|0\.(used|starts|positions|{_NOTE}|[kv]\..+)",
        r"0\.(ids|reserved)",
    ),
    "attend": (r"counters|(\d+\.)?statistic\..+|moments\..+", r".+"),
}
"""Names of the tensors that each op writes (not none: inductor fails then), and, of the others, that it reads."""


@dataclass(frozen=True)
class AppendRule:
    """How a layer takes tokens in; shared by all of its steps.

    Attributes:
        tier: where tokens go that leave the window; ``None`` if none ever does.
        n_sink: leading tokens that never leave it.
        threshold: tokens that a full window holds; tiles leave before the next tokens come, until there are fewer.
        on_nonfinite: "raise" or "zero"; "checked" if the tokens have been looked at already.
        layer: layer index, for messages.
    """

    tier: Tier | None
    n_sink: int
    threshold: int
    on_nonfinite: str = "raise"
    layer: int = 0

    @property
    def packed(self) -> Tier:
        """The tier. Raises ``InputError`` for a ladder without one, whose window nothing leaves."""
        if self.tier is None:
            raise InputError(f"layer {self.layer} has no tier to encode to")
        return self.tier

    @property
    def tile(self) -> int:
        """Tokens that leave the window together."""
        return 0 if self.tier is None else self.tier.keys.tile


@dataclass(frozen=True)
class StepBuffers:
    """What a step reads and writes of a layer; all of it is written in place, and counts are read where they lie.

    ``N`` is the number of tiles in the pool, ``T`` the most tiles that a row and head may have.

    Attributes:
        keys: full-precision window ``[B, H_kv, capacity, D]``, left-aligned: sinks, then the newest tokens.
        values: likewise, ``[B, H_kv, capacity, D_v]``.
        positions: int32 ``[B, capacity]``: logical position of each token of the window.
        lengths: int32 ``[B, H_kv]``: tokens in the window, the same in all heads of a row.
        counters: int64 ``[3]``: see ``LOGICAL``.
        key_fields: pool of packed tiles by the quantizer's names, ``[N, *tile_shape]`` each.
        value_fields: likewise.
        ids: int32 ``[B, H_kv, T]``: pool tile of each tile of a row and head.
        used: int32 ``[B, H_kv]``: tiles in use; heads that evict tokens of their own have numbers of their own.
        reserved: int32 ``[B, H_kv]``: tiles that may be used. ``ids`` up to here are valid, and from ``used`` on they are
            this row's and head's own. Heads of a row have the same number ahead (``reserved - used``).
        starts: int32 ``[B, H_kv, T]``: position of each tile's first token, where a tile's tokens follow one another.
        tile_positions: int32 ``[B, H_kv, T, tile]``: position of each packed token, where positions are kept one by one.
        window_notes: further numbers of 4 bytes a token of the window, ``[B, H_kv, capacity]`` each; 0 for a new token.
        tile_notes: the same of packed tokens, ``[B, H_kv, T, tile]`` each.
        runs: whether ``ids[b, h, n]`` is ``(b * H_kv + h) * T + n`` throughout, so that nobody has to read them.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    lengths: Tensor
    counters: Tensor
    key_fields: Mapping[str, Tensor]
    value_fields: Mapping[str, Tensor]
    ids: Tensor
    used: Tensor
    reserved: Tensor
    starts: Tensor | None = None
    tile_positions: Tensor | None = None
    window_notes: Sequence[Tensor] = ()
    tile_notes: Sequence[Tensor] = ()
    runs: bool = False

    def clone(self) -> StepBuffers:
        """The same contents in other memory."""

        def copy(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: field.clone() for name, field in value.items()}
            if isinstance(value, Sequence):
                return [note.clone() for note in value]
            return value.clone() if isinstance(value, Tensor) else value

        return StepBuffers(**{name: copy(value) for name, value in vars(self).items()})


class LayerBuffers:
    """What a step reads and writes of a layer, in place.

    Args:
        tensors: every tensor by its name, in an order that layers of one make share. Of the window "keys", "values",
            "positions", "lengths", "counters" (as in ``StepBuffers``), "statistic.NAME" and "shift" ``[B, H_kv, capacity]``;
            of its queries "moments.NAME"; of tier ``n`` "n.ids", "n.used", "n.reserved", "n.starts" (as in
            ``StepBuffers``), "n.counts", int32 ``[B, H_kv, T]``, live tokens of each tile, "n.k.NAME" and "n.v.NAME"
            ``[N, *tile_shape]``, and numbers a token, ``[B, H_kv, T, tile]``: "n.statistic.NAME", "n.shift", and, without
            starts, "n.positions".
        tiers: name and quantizers of each packed tier, finest first.
        flags: of each whether ids are in runs (as in ``StepBuffers``), and whether all tiles in use are full.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], tiers: Sequence[Tier], flags: Sequence[tuple[bool, bool]]
    ) -> None:
        self.tensors, self.flags = tensors, flags
        self.keys, self.values, self.positions = tensors["keys"], tensors["values"], tensors["positions"]
        self.lengths, self.counters = tensors["lengths"], tensors["counters"]
        self.notes, self.moments = _matching(_NOTE, tensors), under(tensors, "moments.")
        given = [
            n for n in range(len(tiers)) if f"{n}.ids" in tensors
        ]  # an op is not told of tiers that it does not touch
        self.tiers = [self._tier(under(tensors, f"{n}."), tiers[n], *flags[n]) for n in given]

    def _tier(self, of: Mapping[str, Tensor], tier: Tier, runs: bool, whole: bool) -> TileView:
        """All tiles that buffers have room for."""
        fields, slots = _matching(r"[kv]\..+", of), _matching(rf"starts|positions|{_NOTE}", of)
        where = of["ids"], of["used"], None if whole else of.get("counts"), runs
        return TileView(tier, fields, *where, self.keys.dtype, of["ids"].shape[2], slots=slots)

    @cached_property
    def step(self) -> StepBuffers:
        """What ``append`` takes: the window and the first tier."""
        window, notes = (self.keys, self.values, self.positions, self.lengths, self.counters), [*self.notes.values()]
        if not self.tiers:
            none = self.lengths.new_zeros((*self.lengths.shape, 0))
            return StepBuffers(*window, {}, {}, none, self.lengths, self.lengths, window_notes=notes)
        view = self.tiers[0]
        return StepBuffers(
            *window,
            view.pool_fields("k"),
            view.pool_fields("v"),
            view.ids,
            view.used,
            self.tensors["0.reserved"],
            view.slots.get("starts"),
            view.slots.get("positions"),
            notes,
            [view.slots[name] for name in self.notes],
            view.runs,
        )

    def operands(self, op: str) -> tuple[list[Tensor], list[Tensor]]:
        """Tensors that the custom op "append" or "attend" writes, and those that it reads."""
        written, read = operands(op, tuple(self.tensors))
        return [self.tensors[name] for name in written], [self.tensors[name] for name in read]


def layer_buffers(
    window: Window,
    stores: Sequence[TierStore],
    counters: Tensor,
    moments: QueryMoments | None,
    runs_may_change: bool,
) -> LayerBuffers:
    """The buffers of a layer as they are now; ``runs_may_change``: steps are not to rely on tiles that lie in runs."""
    tensors = window.slots.tensors | {"positions": window.positions}
    tensors |= {"lengths": window.numbers.device, "counters": counters}
    tensors |= {f"moments.{name}": held for name, held in ({} if moments is None else moments.tensors()).items()}
    for number, store in enumerate(stores):
        table = store.table
        numbers = {name: getattr(table, name).device for name in ("ids", "used", "reserved", "counts")}
        tier = numbers | store.pool.fields | table.slots.tensors
        tensors |= {f"{number}.{name}": held for name, held in tier.items()}
    flags = tuple((store.runs and not runs_may_change, store.table.whole()) for store in stores)
    return LayerBuffers(tensors, [store.tier for store in stores], flags)


def _matching(pattern: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those of ``tensors`` whose whole name is as ``pattern`` says."""
    return {name: tensors[name] for name in _names(pattern, tuple(tensors))}


@cache
def _names(pattern: str, names: tuple[str, ...]) -> list[str]:
    """Those ``names`` that are as ``pattern`` says."""
    return [name for name in names if re.fullmatch(pattern, name)]


@cache
def operands(op: str, names: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Those ``names`` whose tensors the custom op ``op`` writes, and those that it reads."""
    writes, reads = map(re.compile, _OPERANDS[op])
    written = [name for name in names if writes.fullmatch(name)]
    return written, [name for name in names if reads.fullmatch(name) and name not in written]
