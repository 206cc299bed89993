"""Running a model with an attention function that looks on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fade_core.errors import InputError, NonFiniteError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "fade-train-policy"
"""What the watching attention function is registered as."""


@dataclass(frozen=True)
class Attention:
    """A layer's causal attention over one text, computed a few queries at a time.

    Attributes:
        layer: layer index.
        queries: float32 ``[H_kv, G, T, D]``, positions applied, times the softmax scale.
        keys: float32 ``[H_kv, T, D]``, positions applied.
        values: float32 ``[H_kv, T, E]``.
        softcap: soft cap of the logits, if the model has one.
        sink_logits: attention-sink logits ``[H_q]``, if the model has them.
        sliding_window: tokens that a query sees, itself included; ``None`` for all before it.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    values: Tensor
    softcap: float | None = None
    sink_logits: Tensor | None = None
    sliding_window: int | None = None

    def probabilities(self, part: slice) -> Tensor:
        """Of the queries ``part``, over all tokens: float32 ``[H_kv, G, q, T]``."""
        heads, tokens, _ = self.keys.shape
        logits = self.queries[:, :, part] @ self.keys[:, None].mT
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        at = torch.arange(tokens, device=logits.device)
        asked = at[part, None]
        hidden = at > asked
        if self.sliding_window is not None:
            hidden = hidden | (at <= asked - self.sliding_window)
        logits.masked_fill_(hidden, -torch.inf)
        if self.sink_logits is None:
            return logits.softmax(-1)
        extra = self.sink_logits.float().view(heads, -1, 1, 1).expand(*logits.shape[:3], 1)
        return torch.cat([logits, extra], -1).softmax(-1)[..., :-1]


Watcher = Callable[[Attention, slice, Tensor], None]
"""Called with a layer's attention, some of its queries and their probabilities ``[H_kv, G, q, T]``, oldest first."""


@contextmanager
def watching(model: PreTrainedModel, watcher: Watcher, block: int = 128) -> Iterator[None]:
    """Run ``model`` on one text at a time inside the block, ``watcher`` seeing every layer without a sliding window.

    Args:
        model: a decoder-only transformers model.
        watcher: what looks on.
        block: queries handled at once; nothing larger than ``[H_q, block, T]`` is held.

    Raises:
        UnsupportedModelError: a model that keeps its own attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
            raise InputError(
                f"one whole text at a time can be watched; found queries {list(query.shape)} over keys {list(key.shape)}"
            )
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        _check_finite(layer, query, key, value)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        heads = key.shape[1]
        q, k, v = query[0].float() * scale, key[0].float(), value[0].float()
        seen = Attention(layer, q.unflatten(0, (heads, -1)), k, v, softcap, s_aux, sliding_window)
        output = q.new_empty(*seen.queries.shape[:3], v.shape[-1])
        for start in range(0, q.shape[1], block):
            part = slice(start, min(start + block, q.shape[1]))
            found = seen.probabilities(part)
            output[:, :, part] = found @ v[:, None]
            if sliding_window is None:
                watcher(seen, part, found)
        return output.flatten(0, 1).transpose(0, 1)[None].to(query.dtype).contiguous(), None

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    before = str(model.config._attn_implementation)
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, ImportError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not let its attention be watched ({error}); take a policy that needs no "
            f"training, such as h2o"
        ) from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _check_finite(layer: int, *tensors: Tensor) -> None:
    for name, tensor in zip(("queries", "keys", "values"), tensors, strict=True):
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(
                f"{name} of layer {layer} are not finite: nothing can be learnt from them. Load the model in float32 or "
                f"bfloat16 (float16 overflows in some models) and check the weights and the text"
            )
