"""Which layers can have buffers of fixed size, and how large those are."""

from __future__ import annotations

import torch

from fade_core.cache.layer import DIRECT_QUERIES, REJECTABLE
from fade_core.cache.layer_plan import LayerPlan
from fade_core.eviction.byte_budget import ByteBudget
from fade_core.eviction.ladder import tokens_of

SMALLEST = 256
"""Tokens of the smallest bucket."""


def bucket(tokens: int) -> int:
    """The size of buffers for ``tokens``: one of four an octave, so that few sizes are ever compiled for."""
    if tokens <= SMALLEST:
        return SMALLEST
    step = 1 << ((tokens - 1).bit_length() - 3)
    return -(-tokens // step) * step


def refusal(plan: LayerPlan) -> str:
    """Why a layer of this plan cannot have a fixed size; empty if it can."""
    ladder = plan.ladder
    if plan.attention != "fade":
        return "the model keeps its own attention, which reads dequantised tokens"
    if plan.rope is not None:
        return "its tokens are read at other positions than they were written (reposition = 'contiguous')"
    if len(ladder.tiers) != 1:
        return f"its ladder has {len(ladder.tiers)} tiers, and buffers of fixed size hold one"
    tier = ladder.tiers[0]
    if ladder.bounded and (reason := _keeps_evicting(plan)):
        return reason
    learner = next((q for q in (tier.keys, tier.values) if q.learns), None)
    if learner is not None:
        return (
            f"quantizer {learner.kind!r} learns from each prompt, and a compiled graph would go on with the last one's"
        )
    return ""


def _keeps_evicting(plan: LayerPlan) -> str:
    """Why the eviction of a layer needs buffers that grow; empty if it does not."""
    policy, tier = f"policy {plan.policy.kind!r}", plan.ladder.tiers[0]
    if plan.allocates:
        return f"{policy} gives heads budgets of their own, and buffers of fixed size have the same room for each"
    if isinstance(plan.ladder.budget, ByteBudget):
        return "its budget is in bytes, and buffers of fixed size hold theirs whatever is in them"
    if plan.tracker.query_statistics:
        return f"{policy} reads statistics of the queries, which compiled steps do not keep"
    if "reread" in plan.tracker.statistics:
        return f"{policy} reads the prompt again before any of it is packed"
    if tier.keys.heads_together or tier.values.heads_together:
        return "a quantizer codes the heads of a row together, which then cannot evict tokens of their own"
    return ""


ARRIVING = 1024
"""Tokens of a later prompt that a layer which evicts has room for, beside those that it keeps."""


def room(plan: LayerPlan, slots: int) -> int:
    """Tiles that a row and head may need: all of ``slots`` tokens, or what is kept of them and what comes before a ranking."""
    ladder = plan.ladder
    tier, tile = ladder.tiers[0], ladder.tile
    most = max(1, (slots - ladder.n_sink - ladder.recent_window) // tile)
    if not ladder.bounded:
        return most
    lengths, window = torch.tensor([slots]), torch.tensor([ladder.n_sink + ladder.recent_window])
    kept = min(int(ladder.packed_budget(lengths, window)), int(tokens_of(tier.capacity, lengths)))
    coming = max(plan.every, ARRIVING) + DIRECT_QUERIES + REJECTABLE
    return min(most, -(-kept // tile) + -(-coming // tile) + 1)
