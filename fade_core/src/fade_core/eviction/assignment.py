"""Moving tokens to the tiers that somebody else chose: the manual loop."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fade_core.errors import InputError
from fade_core.eviction.contents import LayerContents
from fade_core.storage.slots import left_pack, picked
from fade_core.storage.tier_store import TierStore, Tokens


def assign(held: LayerContents, tiers: Tensor) -> tuple[int, int, int]:
    """Move tokens; they only move down.

    Args:
        held: the layer's tokens.
        tiers: int64 ``[B, H_kv, logical]``: wanted tier of each position: 0 full precision, ``i`` the ladder's ``i``-th packed
            tier, -1 evicted.

    Returns:
        tokens that were encoded, demoted and evicted, summed over rows and heads.

    Raises:
        InputError: wrong shape, an unknown tier, a token that would have to move up, tokens of a tile or of a row that
            cannot be parted. Nothing has moved then.
    """
    wanted = _wanted(held, tiers)
    leaving = _leaving_window(held, wanted)
    _check_tiles(held, wanted)
    encoded = dropped = 0
    if leaving is not None:
        encoded = sum(_take_in(store, leaving.of(level)) for level, store in enumerate(held.stores, start=1))
        held.window.assign(*leaving.stay())  # in place: those that leave have been read by now
        dropped = int((leaving.target > len(held.stores)).sum())
    demoted, evicted = _move_down(held, wanted)
    return encoded, demoted, evicted + dropped


def _wanted(held: LayerContents, tiers: Tensor) -> Tensor:
    """``tiers`` on this device with the evicted last, ``len(stores) + 1``. Raises ``InputError``."""
    shape = (held.rows, held.heads, held.logical)
    if tuple(tiers.shape) != shape:
        raise InputError(
            f"layer {held.plan.index}: tiers have shape {tuple(tiers.shape)}; [B, H_kv, T] = {shape} is needed"
        )
    if bool((tiers < -1).any()) or bool((tiers > len(held.stores)).any()):
        raise InputError(
            f"layer {held.plan.index}: tiers must be -1 (evicted), 0 (full precision) or 1..{len(held.stores)} "
            f"({', '.join(s.tier.name for s in held.stores)}); found {int(tiers.min())}..{int(tiers.max())}"
        )
    now, wanted = (t.masked_fill(t < 0, len(held.stores) + 1) for t in (held.tier_map(), tiers.to(held.device)))
    if bool((wanted < now).any()):
        raise InputError(
            f"layer {held.plan.index}: {int((wanted < now).sum())} tokens were asked back up the ladder; "
            "what was dropped cannot be restored, tokens only move down"
        )
    return wanted


def _leaving_window(held: LayerContents, wanted: Tensor) -> _Leaving | None:
    """Tokens that a manual assignment takes out of the window; all heads of a row must agree on them."""
    window = held.window
    where = window.live_positions()
    target = wanted.gather(2, where.clamp_min(0).expand(-1, wanted.shape[1], -1))
    leaving = (target > 0) & (where >= 0)
    if not bool(leaving.any()):
        return None
    if not bool((leaving == leaving[:, :1]).all()):
        raise InputError(f"layer {held.plan.index}: the heads of a row disagree on which tokens leave full precision")
    target = target.masked_fill(~leaving, 0)
    return _Leaving(window.decode(0), window.decode(1), where, window.statistics, target)


def _check_tiles(held: LayerContents, wanted: Tensor) -> None:
    """Refuse to part tokens that share scales. Raises ``InputError``."""
    for store in held.stores:
        if not store.tiles or store.moves_tokens:
            continue
        positions = store.live_positions().unflatten(-1, (-1, store.tile))
        target = wanted.gather(2, positions.flatten(2).clamp_min(0)).view(positions.shape)
        apart = ((target != target[..., :1]) & (positions >= 0)).any(-1)
        if bool(apart.any()):
            tile = positions[apart][0]
            raise InputError(
                f"layer {held.plan.index}: tier {store.tier.name!r} shares scales between the tokens of a tile, so that they "
                f"move together; those at positions {int(tile[0])} to {int(tile.max())} were sent to different tiers. "
                "Send whole tiles, or use quantizers with axis = 'token'."
            )


def _move_down(held: LayerContents, wanted: Tensor) -> tuple[int, int]:
    """Move packed tokens to the tiers they are ``wanted`` in; counts of demoted and evicted ones."""
    demoted = evicted = 0
    for level, store in enumerate(held.stores, start=1):
        for lower in range(level + 1, len(held.stores) + 2):
            positions = store.live_positions()
            moving = (wanted.gather(2, positions.clamp_min(0)) == lower) & (positions >= 0)
            if not bool(moving.any()):
                continue
            if lower > len(held.stores):
                store.split(moving, decode=False)
                evicted += int(moving.sum())
            else:
                demoted += _take_in(held.stores[lower - 1], store.split(moving))
    return demoted, evicted


def _take_in(store: TierStore, tokens: Tokens | None) -> int:
    """Append what there is; says how many tokens."""
    if tokens is None:
        return 0
    store.append(tokens)
    return int(tokens.counts.sum())


@dataclass
class _Leaving:
    """Tokens on their way out of the window, with the tier each is bound for (0: it stays)."""

    keys: Tensor
    values: Tensor
    positions: Tensor
    statistics: dict[str, Tensor]
    target: Tensor

    def stay(self) -> tuple[dict[str, Tensor], Tensor]:
        """What ``Window.assign`` takes to hold the tokens that stay."""
        stays = (self.positions >= 0) & (self.target[:, :1] == 0)
        index = left_pack(stays)  # [B, 1, longest]
        tokens = {"keys": self.keys, "values": self.values, "positions": self.positions}
        tokens |= {f"statistic.{name}": held for name, held in self.statistics.items()}
        return {name: picked(held, index) for name, held in tokens.items()}, stays[:, 0].sum(-1).cpu()

    def of(self, level: int) -> Tokens | None:
        """The tokens bound for tier ``level``."""
        chosen = self.target == level
        counts = chosen.sum(-1).cpu()
        if not bool(counts.any()):
            return None
        index = left_pack(chosen)[..., : int(counts.max())]
        keys, values, positions = (picked(held, index) for held in (self.keys, self.values, self.positions))
        return Tokens(keys, values, positions, counts, {n: picked(held, index) for n, held in self.statistics.items()})
