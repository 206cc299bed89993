"""What masks say: read once a pass, however many layers ask."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor

from fade_core.support.transfer import sent

T = TypeVar("T")


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
