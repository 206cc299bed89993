"""Looking into a layer: what its tokens decode to, and every tensor that it holds."""

from __future__ import annotations

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_core.eviction.contents import LayerContents


def tensors(held: LayerContents) -> dict[str, Tensor]:
    """Every tensor that the tokens need, as "tier/kind"."""
    found = {f"fp16/{n}": t for n, t in held.window.tensors().items()}
    for store in held.stores:
        name, tiled = (
            store.tier.name,
            "tiles." if store.tier.name == "fp16" else "",
        )  # beside the window, which is fp16 too
        found |= {f"{name}/{tiled}{n}": t for n, t in {**store.pool.fields, **store.table.tensors()}.items()}
        for side, quantizer in (("k", store.tier.keys), ("v", store.tier.values)):
            found |= {f"{name}/{side}.state.{n}": t for n, t in quantizer.state_dict().items()}
    if held.queries is not None:
        found |= {f"layer/queries.{n}": t for n, t in held.queries.tensors().items()}
    return found | {"layer/padding": held.padding, "layer/ranked_at": held.ranked_at}


def dense(held: LayerContents, side: str, pending: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Dequantised tokens of "key" or "value" at their logical positions, ``[B, H_kv, logical, D]``; zeros for padding.

    Args:
        held: the layer's tokens.
        side: "key" or "value".
        pending: keys and values ``[B, H_kv, Q, D]`` of the newest tokens, where they are not placed yet.

    Raises:
        InputError: if tokens were evicted: zeros would then change the answer.
    """
    number = 0 if side == "key" else 1
    own, heads, logical = held.window.decode(number), held.heads, held.logical
    have = int(held.window.lengths.sum()) * heads + sum(int(store.lengths.sum()) for store in held.stores)
    have += 0 if pending is None else held.rows * heads * pending[0].shape[2]
    if have < (total := int(held.lengths.sum()) * heads):
        raise InputError(
            f"layer {held.plan.index} has evicted {total - have} tokens, which stock attention cannot leave out; "
            "use FADE's attention (config attention = 'fade') or a ladder without eviction"
        )
    padded = own.new_zeros((held.rows, heads, logical + 1, own.shape[3]))
    for part in held.parts:
        decoded, where = part.decode(number), part.live_positions().expand(-1, heads, -1)
        where = where.where(where >= 0, torch.full_like(where, logical))
        padded.scatter_(2, where[..., None].expand_as(decoded), decoded)
    if pending is not None:
        padded[:, :, logical - pending[number].shape[2] : logical] = pending[number]
    return padded[:, :, :logical]
