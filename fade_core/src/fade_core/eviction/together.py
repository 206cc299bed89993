"""Ranking layers together: those whose numbers are alike are scored, sorted and moved as rows of one batch.

``ranking.rank`` does the same a layer at a time, for whatever does not fit here. What is done here waits for the device at
most once, however many layers there are, and only where stores grow: the host is told which tiles have moved then.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from fade_core.eviction.byte_budget import ByteBudget
from fade_core.eviction.contents import LayerContents
from fade_core.eviction.ranking import checked, layer_scores, lowest_tiles
from fade_core.interfaces import LayerView
from fade_core.storage.slots import by_position, left_pack, picked
from fade_core.storage.tier_store import TierStore
from fade_core.support.transfer import sent

MOST_SLOTS = 1 << 24
"""Slots of rows and heads that are ranked at once: a score and an index of each are held meanwhile."""


def kinship(held: LayerContents) -> Hashable | None:
    """What layers must have in common to be ranked together; ``None`` for one that has to be ranked alone.

    Whole tiles have to move, and none that is freed may be another row's as well.
    """
    plan, ladder, tables = held.plan, held.plan.ladder, [store.table for store in held.stores]
    if plan.allocates or not tables or len({table.stores_positions for table in tables}) > 1:
        return None
    if any(table.shared or table.heads_share_tiles for table in tables):
        return None
    if tables[0].stores_positions and any(store.moves_tokens for store in held.stores):
        return None
    budget = id(ladder.budget) if isinstance(ladder.budget, ByteBudget) else ladder.budget
    found: list[Hashable] = [held.rows, held.heads, held.device, held.logical, held.window.capacity, id(plan.policy)]
    found += [ladder.n_sink, ladder.recent_window, ladder.tile, budget]
    for store, table in zip(held.stores, tables, strict=True):
        found += [store.tier.capacity, table.width, store.pool.capacity, store.fixed, *table.slots.tensors]
    counted = [mirror.host for table in tables for mirror in (table.used, table.reserved)]
    numbers = [held.padding, held.ranked_at, *(t.flatten() for t in (held.window.numbers.host, *counted))]
    return tuple(found), *torch.cat(numbers).tolist()


def moves_whole_tiles(layers: Sequence[LayerContents]) -> bool:
    """Whether all tiles in use of layers of one ``kinship`` are full, and all heads of a row have as many."""
    for i, store in enumerate(layers[0].stores):
        used = store.table.used.host
        counts = torch.stack([held.stores[i].table.counts.host for held in layers])
        if not torch.equal(used, used[:, :1].expand_as(used)) or not bool((counts == store.tile).all()):
            return False
    return True


def rank_together(layers: Sequence[LayerContents], rows: Tensor) -> tuple[int, int, bool, bool]:
    """Score every token and move what is over capacity down the ladder, in layers of one ``kinship`` that move whole tiles.

    A tile that is evicted, or demoted, stays its row's and head's own: it is the next that they fill.

    Args:
        layers: their contents.
        rows: bool ``[B]`` (CPU) of the rows that are ranked.

    Returns:
        tokens of each layer that were demoted, and evicted, summed over rows and heads; whether buffers are others now; and
        whether tiles lay in runs before and may not do so any more.
    """
    first = layers[0]
    ladder, lengths, window = first.plan.ladder, first.lengths, first.window.lengths
    above, scores = torch.zeros((first.rows, first.heads), dtype=torch.long), None
    moved, evicted, rewired, scattered, changed = 0, 0, False, False, list[int]()
    for i, store in enumerate(first.stores):
        over = ladder.overflow(store.lengths, i, above, lengths, window) * rows[:, None]
        if bool(over.any()):
            stores = [held.stores[i] for held in layers]
            if scores is None:
                scores = _scores(layers)
            scattered |= store.runs
            _sort(stores, scores[i], over)
            changed.append(i)
            gone = int(over.sum())
            if i + 1 < len(first.stores):
                rewired |= _demote(stores, [held.stores[i + 1] for held in layers], over)
                moved, scores = moved + gone, None  # the lower tier has other slots now
            else:
                evicted += gone
        above = above + store.lengths
    touched = [held.stores[i] for i in changed for held in layers]
    for store in touched:
        store.table.ids.moved()
    _pull([store for store in touched if not store.fixed])
    for store in touched:
        rewired |= store.shed()
    return moved, evicted, rewired, scattered


def _scores(layers: Sequence[LayerContents]) -> list[Tensor]:
    """The policy's scores of every tier's slots, ``[L * B, H_kv, tiles * tile]`` each."""
    first = layers[0]
    if not first.plan.policy.rowwise:
        return [torch.cat(parts) for parts in zip(*(layer_scores(held)[0] for held in layers), strict=True)]
    many, heads, window = len(layers), first.heads, first.window
    past = torch.arange(window.longest) >= window.lengths[:, None]
    found = torch.cat([held.window.slots["positions"] for held in layers])[:, :, : window.longest].long()
    if bool(past.any()):
        found = found.masked_fill(sent(past, first.device)[:, None].repeat(many, 1, 1), -1)
    positions = [found.expand(-1, heads, -1)]
    for i, store in enumerate(first.stores):
        found, live = _positions([held.stores[i] for held in layers]), _live(store, many)
        positions.append(found if live is None else found.masked_fill(~live.repeat_interleave(store.tile, -1), -1))
    statistics = {name: _statistic(layers, f"statistic.{name}") for name in window.statistics}
    view = LayerView(torch.cat(positions, 2), first.logical, statistics=statistics, lengths=first.lengths.repeat(many))
    scores = checked(first, first.plan.policy.score(view), view.positions.shape)
    return list(scores.split([part.shape[2] for part in positions], dim=2)[1:])


def _statistic(layers: Sequence[LayerContents], name: str) -> Tensor:
    """A number a token of the window and of all tiers, ``[L * B, H_kv, T]``."""
    first = layers[0]
    parts = [torch.cat([held.window.slots[name] for held in layers])[:, :, : first.window.longest]]
    for i, store in enumerate(first.stores):
        tiled = torch.cat([held.stores[i].table.slots[name] for held in layers])  # [L * B, H_kv, T, tile]
        parts.append(tiled[:, :, : store.tiles].flatten(2))
    return torch.cat(parts, 2)


def _positions(stores: Sequence[TierStore]) -> Tensor:
    """Positions of the tokens of all tiles, int64 ``[L * B, H_kv, tiles * tile]``, whether they are in use or not."""
    first = stores[0]
    name = "positions" if first.table.stores_positions else "starts"
    found = torch.cat([store.table.slots[name] for store in stores])[:, :, : first.tiles].long()
    if not first.table.stores_positions:
        found = found[..., None] + torch.arange(first.tile, device=found.device)
    return found.flatten(2)


def _live(store: TierStore, many: int) -> Tensor | None:
    """Tiles in use of so ``many`` layers, bool ``[L * B, H_kv, tiles]``; ``None`` if all are."""
    return None if store.table.even() else sent(store.table.live(), store.device).repeat(many, 1, 1)


def warm_up(held: LayerContents) -> None:
    """Sort and move what is nothing, as a ranking does: libraries load their kernels when they are first asked for them."""
    store, shape = held.stores[0], (held.rows, held.heads, max(1, held.stores[0].table.width))
    scores = torch.zeros((*shape[:2], shape[2] * store.tile), device=held.device)
    gone = lowest_tiles(scores, scores == 0, torch.zeros(shape[:2], dtype=torch.long), store.tile)
    _move([torch.zeros(shape, dtype=torch.int32, device=held.device)], left_pack(~gone))


def _sort(stores: Sequence[TierStore], scores: Tensor, over: Tensor) -> None:
    """Bring the tiles that go, of ``over`` tokens ``[B, H_kv]`` (CPU), behind those that stay; they are not in use then."""
    first, many = stores[0], len(stores)
    live = _live(first, many)
    if live is None:
        live = torch.ones((1, 1, 1), dtype=torch.bool, device=first.device).expand(*scores.shape[:2], first.tiles)
    gone = lowest_tiles(scores, live.repeat_interleave(first.tile, -1), over.repeat(many, 1), first.tile)
    kept = torch.zeros((*gone.shape[:2], first.table.width), dtype=torch.bool, device=first.device)
    kept[..., : first.tiles] = live & ~gone
    order = left_pack(kept)  # reserved tiles come after those that go, as before
    for name in first.table.slots.tensors:
        _move([store.table.slots[name] for store in stores], order)
    _move([store.table.ids.device for store in stores], order)
    used = first.table.used.host - over // first.tile
    _use(stores, used)
    for store in stores:
        store.runs = False
        store.heads_aligned = store.heads_aligned and not store.table.stores_positions


def _move(tensors: Sequence[Tensor], order: Tensor) -> None:
    """Slot ``i`` of each of ``[B, H_kv, T, ...]`` becomes what slot ``order[l * B + b, h, i]`` was, in place."""
    moved = picked(torch.cat([*tensors]), order)
    torch._foreach_copy_([*tensors], [*moved.split(len(tensors[0]))])


def _use(stores: Sequence[TierStore], used: Tensor) -> None:
    """Say that the first ``used`` tiles ``[B, H_kv]`` (CPU) of each row and head are in use; what is reserved stays so."""
    for store in stores:
        store.table.used.host.copy_(used)
    away = [store.table.used.device for store in stores if store.table.used.device is not store.table.used.host]
    if away:
        torch._foreach_copy_(away, [sent(used.int(), away[0].device)] * len(away))


def _demote(stores: Sequence[TierStore], below: Sequence[TierStore], over: Tensor) -> bool:
    """Encode tiles that ``_sort`` has brought behind those in use, ``over`` tokens ``[B, H_kv]`` (CPU), for the next tier.

    Returns:
        whether buffers of the next tier are others now.
    """
    source, target, many, tile = stores[0], below[0], len(stores), stores[0].tile
    gone = over // tile
    number = torch.arange(int(gone.max()))
    there = number < gone[..., None]  # [B, H_kv, n]
    grew = [store.make_room(gone.int()) for store in below]
    come = [
        (store.table.used.host[..., None] + number).clamp_max(store.table.width - 1).long()
        for store in (source, target)
    ]
    at, into = (sent(index, source.device) for index in come)
    # in order of position, as they are in every tier
    sorted_by = "positions" if source.table.stores_positions else "starts"
    found = picked(torch.cat([store.table.slots[sorted_by] for store in stores]), at.repeat(many, 1, 1)).long()
    positions = found if found.dim() == 4 else found[..., None] + torch.arange(tile, device=found.device)
    present = sent(there, source.device).repeat(many, 1, 1)[..., None].expand_as(positions).flatten(2)
    positions = positions.flatten(2)
    order = by_position(present, positions)  # [L * B, H_kv, n * tile]
    ordered = positions.gather(2, order).unflatten(2, (-1, tile))
    new = {"positions": ordered, "starts": ordered[..., 0]}
    for name in source.table.slots.tensors:
        if name not in new:  # statistics; shifts are worked out anew
            held = picked(torch.cat([store.table.slots[name] for store in stores]), at.repeat(many, 1, 1))
            new[name] = held.flatten(2).gather(2, order).unflatten(2, (-1, tile))
    nowhere = sent(~there, source.device)
    for store, other, part in zip(stores, below, order.split(len(over)), strict=True):
        ids = store.table.ids.device.gather(2, at).clamp_min(0).long()
        places = other.table.ids.device.gather(2, into).long().masked_fill(nowhere, -1)
        store.recode(ids, part, other, places)
    b, h, t = (index.repeat(many) for index in there.nonzero(as_tuple=True))
    row = b + torch.arange(many).repeat_interleave(len(b) // many) * len(over)
    index = [sent(part, source.device) for part in (row, h, t, come[1][b, h, t])]
    for name in target.table.slots.tensors:
        tensors = [store.table.slots[name] for store in below]
        both = torch.cat(tensors)
        both[index[0], index[1], index[3]] = new[name][index[0], index[1], index[2]].to(both.dtype)
        torch._foreach_copy_(tensors, [*both.split(len(over))])
    _use(below, target.table.used.host + gone)
    for store, other in zip(stores, below, strict=True):
        other.runs = other.runs and other.table.runs()
        other.heads_aligned = other.heads_aligned and store.heads_aligned
    return any(grew)


def _pull(stores: Sequence[TierStore]) -> None:
    """Tell the host which ids its tables hold now, in one copy."""
    away = [store.table.ids for store in stores if store.device.type != "cpu"]
    if not away:
        return
    found = torch.cat([ids.device.flatten() for ids in away]).cpu().split([ids.device.numel() for ids in away])
    for ids, numbers in zip(away, found, strict=True):
        ids.pull(numbers)
