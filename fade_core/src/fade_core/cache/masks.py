"""Masks: made without a column a query where they hide padding alone, and read once a pass, however many layers ask."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask

from fade_core.support.transfer import sent

T = TypeVar("T")

_take_rows: weakref.WeakValueDictionary[int, PreTrainedConfig] = weakref.WeakValueDictionary()
"""Configurations, by id, of models that pass a mask ``[B, T]`` on as it is: they do so for flash attention."""


def take_rows(model: PreTrainedModel) -> None:
    """Masks of this ``model`` that hide padding alone may be ``[B, T]``, if it hands them on to attention unseen."""
    if model._supports_flash_attn:
        for config in (model.config, model.config.get_text_config(decoder=True)):
            _take_rows[id(config)] = config


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a pass, as transformers asks for it.

    Returns:
        ``None`` for a prompt whose tokens see all that came before them; bool ``[B, T]`` where several queries see that but
        for padding; else what transformers makes for its own attention, ``[B, 1, Q, T]``.
    """
    plain = mask_function is causal_mask_function and kwargs.get("allow_is_causal_skip", True)
    plain = plain and config is not None and _take_rows.get(id(config)) is config
    plain = plain and isinstance(q_offset, int) and kv_offset == 0 and kv_length == q_offset + q_length
    if plain and q_length > 1 and not torch.compiler.is_compiling():
        rows = attention_mask
        if rows is None:
            rows = torch.ones((batch_size, kv_length), dtype=torch.bool, device=kwargs.get("device"))
        if rows.shape[1] == kv_length and (q_offset or not bool(rows.all())):
            return rows.bool()
    options = kwargs | {"mask_function": mask_function, "attention_mask": attention_mask, "config": config}
    made: Tensor | None = sdpa_mask(batch_size, q_length, kv_length, q_offset, kv_offset, **options)
    return made


def newest(mask: Tensor) -> Tensor:
    """What the last query may see, bool ``[B or 1, T]``, of a mask ``[B or 1, H or 1, Q, T]`` or ``[B, T]``."""
    return mask if mask.dim() == 2 else mask[:, :, -1].any(1)


class MaskReader:
    """Reads the masks of a cache's passes: its layers share one, which is looked at once."""

    def __init__(self) -> None:
        self._answers: dict[tuple[object, ...], object] = {}
        self._mask: weakref.ref[Tensor] | None = None

    def _once(self, mask: Tensor, question: tuple[object, ...], ask: Callable[[], T]) -> T:
        if self._mask is None or self._mask() is not mask:
            self._answers, self._mask = {}, weakref.ref(mask)
        if question not in self._answers:
            self._answers[question] = ask()
        return cast(T, self._answers[question])

    def leading_padding(self, mask: Tensor, chunk: int) -> Tensor:
        """Columns of a chunk before the first one that its last query sees, int64 ``[B]`` on the CPU."""

        def ask() -> list[int]:
            seen = newest(mask)[:, -chunk:].cpu()
            return torch.where(seen.any(-1), seen.int().argmax(-1), chunk).tolist()

        return torch.tensor(self._once(mask, ("padding", chunk), ask))

    def hides_padding_alone(self, mask: Tensor, logical: int, padding: Tensor, last: bool = False) -> bool:
        """Whether a mask hides nothing but leading padding, which is not stored, and tokens after the query.

        Args:
            mask: bool ``[B or 1, 1, Q, T]``, or ``[B, T]``.
            logical: tokens the model has seen, the queries' own included.
            padding: columns of padding before each row's first token, int64 ``[B]`` on the CPU.
            last: look at the newest query alone.
        """

        def ask() -> bool:
            where = torch.arange(logical, device=mask.device)
            padded = where < sent(padding, mask.device)[:, None]  # [B, logical]
            if mask.dim() == 2:
                return bool((mask[:, :logical] | padded).all())
            padded, rows = padded[:, None, None], mask[:, :, -1:] if last else mask  # [B, 1, 1, logical]
            causal = where <= where[logical - rows.shape[2] :, None]  # [Q, logical]
            return bool(((rows[..., :logical] == causal) | padded).all())

        return self._once(mask, ("hides", logical, last, *padding.tolist()), ask)
