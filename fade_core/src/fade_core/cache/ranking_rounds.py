"""Rankings of all layers at once, where layers are alike; each of the others ranks itself when its turn comes."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Sequence

import torch

from fade_core.cache.layer import TieredLayer
from fade_core.eviction.together import MOST_SLOTS, kinship, moves_whole_tiles, rank_together


def read_together(layers: Sequence[TieredLayer]) -> None:
    """Read back what steps have changed in all ``layers``, in one copy. Raises as ``LayerSteps.read_back``."""
    behind = [layer for layer in layers if layer.steps.behind and layer.device.type != "cpu"]
    if len({layer.device for layer in behind}) == 1:  # a model on several devices reads each layer by itself
        unread = [layer.steps.unread(layer.known) for layer in behind]
        wide, narrow = [own[0] for own in unread], [t.flatten() for own in unread for t in own[1:]]
        found = torch.cat([torch.cat(wide), torch.cat(narrow).long()]).cpu()
        counters, rest = found.split([sum(map(len, wide)), sum(map(len, narrow))])
        numbers = iter(rest.split([len(t) for t in narrow]))
        for layer, counted, own in zip(behind, counters.split([len(t) for t in wide]), unread, strict=True):
            layer.steps.read_back(layer.known, [counted, *(next(numbers) for _ in own[1:])])
            layer.tell_steps()
    for layer in layers:
        layer.sync()


def rank_due(layers: Sequence[TieredLayer]) -> None:
    """Between two passes: rank the rows that are due, as each layer would by itself, in few operations for all."""
    waiting = [layer for layer in layers if layer.waits_for_ranking]
    if not waiting:
        return
    read_together(waiting)
    groups: dict[Hashable, list[TieredLayer]] = {}
    for layer in waiting:
        if bool(layer.due_rows().any()):
            layer.pack_due()
            alike = kinship(layer.held)
            if alike is not None:
                groups.setdefault((alike, layer.plan.every), []).append(layer)
    for group in groups.values():
        if not moves_whole_tiles([layer.held for layer in group]):
            continue
        held = group[0].held
        slots = held.rows * held.heads * sum(part.longest for part in held.everything)
        most = max(1, MOST_SLOTS // max(1, slots))
        for start in range(0, len(group), most):
            _rank(group[start : start + most])


def _rank(layers: Sequence[TieredLayer]) -> None:
    rows, started = layers[0].due_rows(), time.perf_counter()
    before = [layer.held_bytes() for layer in layers]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.tearing("ranking its tokens"))
        demoted, evicted, rewired, scattered = rank_together([layer.held for layer in layers], rows)
    for layer, was in zip(layers, before, strict=True):
        moves = rewired or (scattered and not layer.steps.compiles)  # whose steps never rely on runs
        layer.ranked(rows, {"demote": demoted, "evict": evicted}, moves, was, started)
