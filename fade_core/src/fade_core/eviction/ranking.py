"""Who stays and where: tokens are scored, and what is over capacity goes down the ladder or away."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.eviction.contents import LayerContents
from fade_core.eviction.ladder import in_tiles, lowest
from fade_core.interfaces import LayerView
from fade_core.storage.tier_store import TierStore, Tokens
from fade_core.support.transfer import sent


def rank(held: LayerContents, rows: Tensor) -> tuple[int, int]:
    """Score every token and move what is over capacity down the ladder.

    Args:
        held: the layer's tokens.
        rows: bool ``[B]`` (CPU) of the rows that are ranked.

    Returns:
        tokens that were demoted, and evicted, summed over rows and heads.
    """
    ladder = held.plan.ladder
    scores, room = _rooms(held)
    above = torch.zeros((held.rows, held.heads), dtype=torch.long)
    moved = evicted = 0
    for i, store in enumerate(held.stores):
        over = ladder.overflow(store.lengths, i, above, held.lengths, held.window.lengths, room) * rows[:, None]
        if bool(over.any()):
            if scores is None:
                scores = layer_scores(held)[0]
            last, before = i + 1 == len(held.stores), store.lengths
            tokens = store.split(_choose(store, scores[i], over), decode=not last)
            gone = int((before - store.lengths).sum())
            if tokens is not None:
                held.stores[i + 1].append(tokens)
                moved += gone
                scores = None  # the lower tier has other slots now
            else:
                evicted += gone
        above = above + store.lengths
    return moved, evicted


def place(held: LayerContents, run: Tokens, moving: Tokens, due: Tensor) -> int:
    """Place the prompt's tokens directly: the best into the first tier, the next into the second, and so on.

    Args:
        held: the layer's tokens; nothing is packed yet.
        run: all tokens of the prompt and the window, left-aligned; positions ``[B, 1, T]``.
        moving: those of them that leave the window, from slot ``n_sink`` on.
        due: tokens of each row that leave, int64 ``[B]`` on the CPU.

    Returns:
        tokens that found no place, summed over rows and heads.
    """
    ladder, policy = held.plan.ladder, held.plan.policy
    count = run.counts[:, 0]
    window, (width, heads) = count - due, (moving.keys.shape[2], held.heads)
    live = (torch.arange(width, device=held.device) < sent(due[:, None], held.device))[:, None].expand(-1, heads, -1)
    room = None
    if policy.positional:
        scores = torch.arange(width, device=held.device).float().expand_as(live)
    else:
        part = slice(ladder.n_sink, ladder.n_sink + width)
        real = torch.arange(run.keys.shape[2], device=held.device) < sent(count[:, None], held.device)  # [B, T]
        where = run.positions.masked_fill(~real[:, None], -1).expand(-1, heads, -1)
        view = _view(held, where, run.statistics, run.keys.float, run.values.float)
        every = checked(held, policy.score(view), where.shape)
        scores = every[:, :, part]
        if held.plan.allocates:
            competing = torch.full_like(every, -torch.inf)
            competing[:, :, part] = scores.masked_fill(~live, -torch.inf)
            room = _allocated(held, view, competing, ladder.packed_budget(held.lengths, window), moving.counts)
    takes = ladder.fill(due if room is None else moving.counts, held.lengths, window, room)
    order = torch.argsort(scores.masked_fill(~live, -torch.inf), dim=-1, descending=True, stable=True)
    rank, upper = torch.argsort(order, dim=-1), torch.zeros_like(moving.counts)
    for store, taken in zip(held.stores, takes, strict=True):
        take = taken if taken.dim() == 2 else taken[:, None].expand(-1, heads)
        lower, upper = upper, upper + take
        if not bool(take.any()):
            continue
        above, below = (sent(bound, held.device)[..., None] for bound in (lower, upper))
        chosen = (rank >= above) & (rank < below) & live
        index = torch.argsort(~chosen, dim=-1, stable=True)[..., : int(take.max())]
        first = None
        if policy.positional and moving.first is not None:  # the newest come first: what a tier takes is a run
            first = moving.first + due[:, None] - upper
        store.append(replace(moving, counts=take.contiguous(), first=first), index)
    return int((moving.counts - upper).sum())


def _view(
    held: LayerContents,
    positions: Tensor,
    statistics: Mapping[str, Tensor],
    keys: Callable[[], Tensor],
    values: Callable[[], Tensor],
) -> LayerView:
    """What the policy sees of tokens at ``positions`` ``[B, H_kv, T]``."""
    where = held.logical, held.plan.index, held.plan.num_layers
    queries = {} if held.queries is None else held.queries.statistics()
    return LayerView(positions, *where, dict(statistics), keys, values, held.lengths, queries)


def _rooms(held: LayerContents) -> tuple[list[Tensor] | None, Tensor | None]:
    """Packed tokens that each head may keep, ``[B, H_kv]``, with the tiers' scores if the policy was asked for it.

    ``None`` for the same in every head.
    """
    ladder, packed = held.plan.ladder, sum(store.lengths for store in held.stores)
    if not held.plan.allocates or not isinstance(packed, Tensor):
        return None, None
    budget = ladder.packed_budget(held.lengths, held.window.lengths)
    if bool((packed.sum(1) <= budget * packed.shape[1]).all()):
        return None, packed
    scores, view = layer_scores(held)
    kept = [part.masked_fill(s.live_positions() < 0, -torch.inf) for part, s in zip(scores, held.stores, strict=True)]
    always = view.positions.shape[2] - sum(part.shape[2] for part in kept)
    competing = torch.cat([kept[0].new_full((*packed.shape, always), -torch.inf), *kept], 2)
    return scores, _allocated(held, view, competing, budget, packed)


def _allocated(held: LayerContents, view: LayerView, competing: Tensor, budget: Tensor, packed: Tensor) -> Tensor:
    """What the policy lets each head keep of the packed tokens ``packed`` ``[B, H_kv]``, in whole tiles.

    Rows that are within the budget keep all, whatever their heads would be given: it would be given up for nothing.
    """
    policy, even = held.plan.policy, budget[:, None].expand_as(packed)
    found = policy.allocate(view, competing, sent(budget, held.device))
    wanted = even if found is None else found.cpu()
    if wanted.shape != packed.shape or wanted.is_floating_point() or bool((wanted < 0).any()):
        raise InputError(
            f"policy {policy.kind!r} allocated {wanted.dtype} {tuple(wanted.shape)} in layer {held.plan.index}; int64 "
            f"[B, H_kv] = {tuple(packed.shape)}, none of it negative, is needed"
        )
    if bool((wanted.sum(1) > even.sum(1)).any()):
        raise InputError(
            f"policy {policy.kind!r} allocated {int(wanted.sum(1).max())} tokens to the heads of a row in layer "
            f"{held.plan.index}; the budget is {int(even.sum(1).min())}"
        )
    within = packed.sum(1, True) <= even.sum(1, True)
    return torch.where(within, packed, in_tiles(wanted, packed, held.plan.ladder.tile))


def layer_scores(held: LayerContents) -> tuple[list[Tensor], LayerView]:
    """The policy's scores of every tier's slots, ``[B, H_kv, tiles * tile]`` each, and what it saw."""
    window, parts = held.window, held.everything
    positions = [part.live_positions().expand(-1, held.heads, -1) for part in parts]
    statistics = {n: torch.cat([part.statistics[n] for part in parts], 2) for n in window.statistics}

    def decoded(side: int) -> Tensor:
        return torch.cat([window.decode(side), *(store.decode(side) for store in held.packed)], 2).float()

    view = _view(held, torch.cat(positions, 2), statistics, lambda: decoded(0), lambda: decoded(1))
    scores = checked(held, held.plan.policy.score(view), view.positions.shape)
    return list(scores.split([p.shape[2] for p in positions], dim=2)[1:]), view


def checked(held: LayerContents, scores: Tensor, shape: torch.Size) -> Tensor:
    """A policy's ``scores``, NaN the lowest. Raises ``InputError`` if they are not of ``shape``."""
    if scores.shape != shape:
        raise InputError(
            f"policy {held.plan.policy.kind!r} scored layer {held.plan.index} with shape {tuple(scores.shape)}; "
            f"[B, H_kv, T] = {tuple(shape)} is needed"
        )
    return scores.float().nan_to_num(nan=-torch.inf)


def _choose(store: TierStore, scores: Tensor, over: Tensor) -> Tensor:
    """Which slots of ``store`` go: the lowest tokens, or whole tiles by their mean where tokens cannot be parted."""
    positions = store.live_positions()
    live = positions >= 0
    if store.table.stores_positions and store.moves_tokens:
        return lowest(scores, live, over)
    return lowest_tiles(scores, live, over, store.tile).repeat_interleave(store.tile, dim=-1) & live


def lowest_tiles(scores: Tensor, live: Tensor, over: Tensor, tile: int) -> Tensor:
    """The tiles that go, bool ``[B, H_kv, n]``: those of lowest mean until they hold ``over`` ``[B, H_kv]`` (CPU) tokens.

    Args:
        scores: of every token, ``[B, H_kv, n * tile]``.
        live: whether there is one.
        over: tokens to be given up at least.
        tile: tokens of a tile.
    """
    tiled = scores.masked_fill(~live, 0).unflatten(-1, (-1, tile)).sum(-1)
    count = live.unflatten(-1, (-1, tile)).sum(-1)
    order = torch.argsort((tiled / count.clamp_min(1)).masked_fill(count == 0, torch.inf), dim=-1, stable=True)
    sizes = count.gather(2, order)  # a tile that was cut short gives less: others go with it
    gone = (sizes.cumsum(-1) - sizes < sent(over, sizes.device)[..., None]) & (sizes > 0)
    return torch.zeros_like(gone).scatter_(2, order, gone)
