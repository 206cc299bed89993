"""What a layer accepts: new keys and values are refused here, before anything has changed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fade_core.errors import InputError, NonFiniteError
from fade_core.support.transfer import arriving


def check_room(layer: int, cached: int, new: int, limit: int | None) -> None:
    """Refuse tokens past ``max_cache_len``. Raises ``InputError``."""
    if limit is not None and cached + new > limit:
        raise InputError(
            f"layer {layer}: {cached} tokens are cached and {new} more would pass max_cache_len={limit}; "
            "create the cache with a larger max_cache_len"
        )


def check_tokens(layer: int, keys: Tensor, values: Tensor, held: tuple[Tensor, Tensor] | None) -> None:
    """Refuse new tokens that are not ``[B, H_kv, T >= 1, D]`` or do not fit the keys and values that are held.

    Raises:
        InputError: wrong shape, dtype, device, batch size, heads or channels.
    """
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3] or not keys.numel():
        raise InputError(
            f"layer {layer}: keys {tuple(keys.shape)} and values {tuple(values.shape)} must both be "
            "[B, H_kv, T, D], with at least one token"
        )
    if not keys.is_floating_point() or keys.dtype != values.dtype:
        raise InputError(
            f"layer {layer}: keys are {keys.dtype} and values {values.dtype}; both must be one floating type"
        )
    if held is None:
        return
    if keys.shape[0] != held[0].shape[0]:
        raise InputError(
            f"layer {layer}: the batch has {keys.shape[0]} rows, the cache holds {held[0].shape[0]}; use "
            "batch_select_indices or batch_repeat_interleave to change rows, or a fresh cache"
        )
    for side, new, old in (("keys", keys, held[0]), ("values", values, held[1])):
        if new.shape[1] != old.shape[1] or new.shape[3] != old.shape[3]:
            raise InputError(
                f"layer {layer}: {side} have {new.shape[1]} heads of {new.shape[3]} channels; the cache holds "
                f"{old.shape[1]} heads of {old.shape[3]}"
            )
    if keys.dtype != held[0].dtype or keys.device != held[0].device:
        raise InputError(
            f"layer {layer}: keys are {keys.dtype} on {keys.device}; the cache holds {held[0].dtype} on {held[0].device}"
        )


class FiniteCheck:
    """Refuses NaN and infinity among new keys and values, layer by layer, or once a forward pass.

    The host reads one number for an answer, and waits for a GPU until then. A wait in every layer would leave it idle
    again and again: so layers only ask, and the last one reads all answers, when every layer before it can still be taken back.

    Args:
        last: index of the last layer that asks; ``None`` if each reads its own answer.
        deferred: whether answers are read at the end; ``None``: if tokens lie on a GPU.
    """

    def __init__(self, last: int | None = None, deferred: bool | None = None) -> None:
        self.last, self.deferred = last, deferred
        self._asked: list[tuple[int, int, Tensor]] = []
        self._soon: Callable[[], Tensor] | None = None

    def __call__(
        self,
        layer: int,
        keys: Tensor,
        values: Tensor,
        start: int,
        on_nonfinite: str,
        at_once: bool = False,
        soon: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As ``check_finite``.

        Args:
            layer: layer index.
            keys: ``[B, H_kv, Q, D]``.
            values: likewise.
            start: logical position of the first token.
            on_nonfinite: "raise" or "zero".
            at_once: read the answer now, whatever it costs.
            soon: ``confirm`` will read it before anything is stored; the device gets on meanwhile.

        Raises:
            NonFiniteError: for this layer, or from the last one for whichever was first.
        """
        self._soon = None
        deferred = keys.device.type == "cuda" if self.deferred is None else self.deferred
        if not deferred or self.last is None:
            return check_finite(layer, keys, values, start, on_nonfinite)
        if self._asked and self._asked[-1][0] >= layer:
            self._asked.clear()  # of a pass that was interrupted
        if at_once or (soon and layer >= self.last):  # which waits in any case
            keys, values = check_finite(layer, keys, values, start, on_nonfinite)
        elif on_nonfinite == "zero":
            keys, values = (t.masked_fill(~torch.isfinite(t), 0) for t in (keys, values))
        else:
            wide = torch.float64 if keys.dtype != torch.float16 else torch.float32  # where no sum overflows
            self._asked.append((layer, start, torch.isfinite(keys.sum(dtype=wide) + values.sum(dtype=wide))))
            self._soon = arriving(self._asked[-1][2]) if soon else None
        if layer >= self.last and self._asked:
            self._answer(keys)
        return keys, values

    def confirm(self, layer: int, keys: Tensor, values: Tensor, start: int) -> None:
        """Read the answer about the layer that asked last, if it was to be read ``soon``; arguments as it asked.

        Raises:
            NonFiniteError: says where the first NaN or infinity is.
        """
        soon, self._soon = self._soon, None
        if soon is not None and not bool(soon()):
            check_finite(layer, keys, values, start, "raise")

    def _answer(self, keys: Tensor) -> None:
        """Read all answers, where ``keys`` are. Raises ``NonFiniteError``."""
        asked, self._asked = self._asked, []
        answers = torch.stack([answer.to(keys.device) for _, _, answer in asked]).tolist()
        bad = next((one for one, fine in zip(asked, answers, strict=True) if not fine), None)
        if bad is not None:
            raise NonFiniteError(
                f"layer {bad[0]}: NaN or infinity in the keys or values of the {keys.shape[2]} tokens from position "
                f"{bad[1]} on. {_ADVICE}"
            )


_ADVICE = "Look for an overflow in the model (float16 is the usual cause), or set on_nonfinite = 'zero' to store zeros instead."


def check_finite(layer: int, keys: Tensor, values: Tensor, start: int, on_nonfinite: str) -> tuple[Tensor, Tensor]:
    """Keys and values without NaN and infinity: as they are, with zeros in their place, or refused.

    Args:
        layer: layer index.
        keys: ``[B, H_kv, Q, D]``.
        values: likewise.
        start: logical position of the first token.
        on_nonfinite: "raise" or "zero".

    Raises:
        NonFiniteError: says where the first one is.
    """
    if bool(torch.isfinite(keys.sum() + values.sum())):
        return keys, values
    bad_keys, bad_values = ~torch.isfinite(keys), ~torch.isfinite(values)
    bad = (bad_keys.any(-1) | bad_values.any(-1)).any(1)  # [B, Q]
    if not bool(bad.any()):  # every element is finite; only their sum overflowed
        return keys, values
    if on_nonfinite == "zero":
        return keys.masked_fill(bad_keys, 0), values.masked_fill(bad_values, 0)
    row, column = (int(i) for i in bad.nonzero()[0])
    side = "keys" if bool(bad_keys[row, :, column].any()) else "values"
    raise NonFiniteError(
        f"layer {layer}: NaN or infinity in the {side} at position {start + column} of row {row} "
        f"({int(bad.sum())} tokens concerned). {_ADVICE}"
    )
