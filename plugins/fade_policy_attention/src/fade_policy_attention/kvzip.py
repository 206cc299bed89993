"""What the model looks at when it repeats the text (KVzip, arXiv 2505.23416).

Statistic: "reread", the most that any query of any head gave to a token during that repetition.
Cost: 4 bytes a token and head. The prompt runs through the model once more, chunk by chunk, against all of itself, and every
attention logit of that is computed a second time; until then the cache holds the prompt in full precision.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fade_core.errors import InputError, UnsupportedModelError
from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig

OVERLAP = 8
"""Tokens before a chunk that tell the model where to go on."""


class KVzipPolicy(EvictionPolicy):
    """A token is worth the most attention that it got while the model repeated the text.

    Tokens that came after the repetition are kept before all others. The paper's softmax runs over the chunk that is
    repeated; here it runs over the whole text, as the model's does.

    Args:
        chunk: tokens repeated in one forward pass.
        instruction: token ids before each chunk that ask for the repetition, such as those of "Repeat the previous
            context exactly.", with empty lines around it.
    """

    kind: ClassVar[str] = "kvzip"
    statistics: tuple[str, ...] = ("reread",)

    def __init__(self, chunk: int = 512, instruction: tuple[int, ...] = ()) -> None:
        self.chunk, self.instruction = chunk, instruction

    def score(self, view: LayerView) -> Tensor:
        given = view.statistic("reread")
        first = view.positions == (view.logical_length - view.lengths.to(given.device))[:, None, None]
        if bool((first & view.valid & (given == 0)).any()):
            raise InputError(
                "policy 'kvzip' ranks a prompt that the model has not repeated; feed the prompt with "
                "cache.prefill(model, input_ids[:, :-1]) before generate"
            )
        return torch.where(given == 0, 2.0, given)  # attention is at most 1

    def prefill(
        self,
        model: Any,
        cache: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        chunk: int | None = None,
        **options: Any,
    ) -> Any:
        """Feed the prompt, have the model repeat it, and only then compress and evict.

        Raises:
            UnsupportedModelError: if a layer of the model cannot be read without changing it.
        """
        if cache.unreadable:
            raise UnsupportedModelError(
                f"the model cannot repeat a prompt without adding to the cache: {cache.unreadable}"
            )
        with cache.holding():
            output = super().prefill(model, cache, input_ids, attention_mask, chunk, **options)
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            asked = torch.tensor(self.instruction, dtype=torch.long, device=input_ids.device)
            asked = asked.expand(input_ids.shape[0], -1)
            with cache.reading():
                for start in range(0, input_ids.shape[1], self.chunk):
                    part = slice(max(0, start - OVERLAP), start + self.chunk)
                    ids = torch.cat([asked, input_ids[:, part]], 1)
                    seen = torch.cat([mask, torch.ones_like(asked), mask[:, part]], 1)
                    places = (seen.cumsum(1) - 1).clamp_min(0)[:, -ids.shape[1] :]
                    model(
                        input_ids=ids,
                        attention_mask=seen,
                        position_ids=places,
                        past_key_values=cache,
                        use_cache=True,
                        **options,
                    )
        return output


class KVzipConfig(PolicyConfig):
    """``kind = "kvzip"``: least attended while repeating first. The prompt goes in through ``cache.prefill``.

    Attributes:
        chunk: tokens repeated in one forward pass.
        instruction: token ids that ask for the repetition.
    """

    kind: Literal["kvzip"] = "kvzip"
    chunk: Annotated[int, Field(strict=True, ge=1)] = 512
    instruction: tuple[Annotated[int, Field(strict=True, ge=0)], ...] = ()

    def build(self) -> KVzipPolicy:
        return KVzipPolicy(self.chunk, self.instruction)
