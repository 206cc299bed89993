"""What the model looks at when it repeats the text (KVzip, arXiv 2505.23416).

Statistic: "reread", the most that any query of any head gave to a token during that repetition.
Cost: 4 bytes a token and head. The prompt runs through the model once more, chunk by chunk, against all of itself, and every
attention logit of that is computed a second time; until then the cache holds the prompt in full precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fade_core.errors import InputError, UnsupportedModelError
from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig

if TYPE_CHECKING:
    from fade_core import TieredKVCache

OVERLAP = 8
"""Tokens before a chunk that tell the model where to go on."""


class KVzipPolicy(EvictionPolicy):
    """A token is worth the most attention that it got while the model repeated the text.

    Tokens that came after the repetition are kept before all others. The paper's softmax runs over the chunk that is
    repeated; here it runs over the whole text, as the model's does.
    """

    kind: ClassVar[str] = "kvzip"
    statistics: tuple[str, ...] = ("reread",)

    def score(self, view: LayerView) -> Tensor:
        given = view.statistic("reread")
        first = view.positions == (view.logical_length - view.lengths.to(given.device))[:, None, None]
        if bool((first & view.valid & (given == 0)).any()):
            raise InputError(
                "policy 'kvzip' ranks a prompt that the model has not repeated yet; feed it with "
                "fade_policy_attention.kvzip_prefill(model, cache, input_ids) instead of model(input_ids)"
            )
        return torch.where(given == 0, 2.0, given)  # attention is at most 1


class KVzipConfig(PolicyConfig):
    """``kind = "kvzip"``: least attended while repeating first. Needs ``kvzip_prefill``."""

    kind: Literal["kvzip"] = "kvzip"

    def build(self) -> KVzipPolicy:
        return KVzipPolicy()


@torch.no_grad()
def kvzip_prefill(
    model: Any,
    cache: TieredKVCache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    instruction: Sequence[int] = (),
    chunk: int = 512,
) -> Any:
    """Feed a prompt to an empty cache, have the model repeat it, and only then compress and evict.

    ``generate`` goes on from the last token, so leave that out: ``kvzip_prefill(model, cache, ids[:, :-1])``, then
    ``model.generate(ids, past_key_values=cache)``.

    Args:
        model: the model the cache was made for.
        cache: an empty cache whose policy is "kvzip", or has it inside.
        input_ids: int64 ``[B, T]``.
        attention_mask: int ``[B, T]``, 0 for padding on the left; ``None`` for none.
        instruction: token ids before each chunk that ask for the repetition, such as those of "Repeat the previous
            context exactly.", with empty lines around it.
        chunk: tokens repeated in one forward pass.

    Returns:
        the model's output for the prompt.

    Raises:
        InputError: if the cache holds tokens, its policy does not read "reread", or ``chunk`` is not positive.
        UnsupportedModelError: if a layer of the model cannot be read without changing it.
    """
    if "reread" not in cache.tracker.statistics:
        raise InputError(
            "the cache's policy does not read what a repetition tells; create the cache with policy = {kind = 'kvzip', ...} "
            "or {kind = 'adakv', base = {kind = 'kvzip'}, ...}"
        )
    if cache.unreadable:
        raise UnsupportedModelError(f"the model cannot repeat a prompt without adding to the cache: {cache.unreadable}")
    if cache.get_seq_length():
        raise InputError(f"the cache holds {cache.get_seq_length()} tokens; kvzip_prefill takes an empty one")
    if chunk < 1:
        raise InputError(f"chunk={chunk} must be at least one token")
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    with cache.holding():
        output = _pass(model, cache, input_ids, mask)
        with cache.reading():
            for start in range(0, input_ids.shape[1], chunk):
                part = slice(max(0, start - OVERLAP), start + chunk)
                asked = torch.tensor(list(instruction), dtype=torch.long, device=input_ids.device)
                asked = asked.expand(input_ids.shape[0], -1)
                ids = torch.cat([asked, input_ids[:, part]], 1)
                seen = torch.cat([mask, torch.ones_like(asked), mask[:, part]], 1)
                _pass(model, cache, ids, seen, logits_to_keep=1)
    return output


def _pass(model: Any, cache: TieredKVCache, ids: Tensor, mask: Tensor, **options: Any) -> Any:
    """One forward pass of ``ids``, the last columns of ``mask``, at the positions that unpadded rows would have."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **options
    )
