"""The texts of an evaluation, as token ids of the right length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fade_core.errors import InputError
from fade_eval.texts import passages

Text = str | Tensor | Sequence[int]
Texts = Text | Sequence[Text] | None


def token_rows(
    texts: Texts, tokenizer: Any, needed: int, device: torch.device, limit: int | None = None
) -> list[Tensor]:
    """Each text as int64 ids ``[1, needed]``.

    Args:
        texts: one text or several, each a string or token ids; ids ``[n, T]`` are ``n`` texts; ``None`` takes the
            evaluation texts that FADE ships.
        tokenizer: needed for strings.
        needed: tokens that are used of each.
        device: where the ids go.
        limit: number of texts to take; ``None`` for all.

    Raises:
        InputError: if a text is too short, or a string comes without tokenizer.
    """
    if limit is not None:
        check_counts(max_texts=limit)
    if texts is None:
        return _shipped_rows(tokenizer, needed, device, limit)
    rows = []
    for number, text in enumerate(_separate(texts)[:limit]):
        ids = _ids(text, tokenizer)
        if ids.numel() < needed:
            raise InputError(
                f"text {number} has {ids.numel()} tokens and {needed} are needed (prompt, steps and one to predict); "
                f"give a longer text, or fewer prompt_tokens or steps"
            )
        rows.append(ids[None, :needed].to(device))
    if not rows:
        raise InputError("no text was given")
    return rows


def long_row(texts: Texts, tokenizer: Any, needed: int, device: torch.device) -> Tensor:
    """Texts one after the other as int64 ids ``[1, needed]``; arguments as for ``token_rows``.

    Raises:
        InputError: if they are too short together, or a string comes without tokenizer.
    """
    if texts is None:
        return _shipped_rows(tokenizer, needed, device, 1)[0]
    ids = torch.cat([_ids(text, tokenizer) for text in _separate(texts)])
    if ids.numel() < needed:
        raise InputError(
            f"the texts have {ids.numel()} tokens together and {needed} are needed for a long run; give more text, or fewer "
            "long_steps (0 for none)"
        )
    return ids[None, :needed].to(device)


def evaluation_texts() -> list[str]:
    """The public-domain texts that FADE ships for measuring (none is used for calibration or training)."""
    return [passage.text for passage in passages("evaluation")]


def encode(text: str, tokenizer: Any, special: bool = True) -> Tensor:
    """Token ids ``[T]`` of a string. Raises ``InputError`` without a tokenizer."""
    if tokenizer is None:
        raise InputError("texts are strings, so their tokenizer is needed: pass tokenizer=..., or token ids")
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def check_counts(**counts: object) -> None:
    """Refuse anything but whole numbers from 1 on. Raises ``InputError`` naming the argument."""
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} must be a whole number of at least 1; found {value!r}")


def _separate(texts: Text | Sequence[Text]) -> list[Text]:
    if isinstance(texts, str):
        return [texts]
    if isinstance(texts, Tensor):
        if texts.dim() not in (1, 2):
            raise InputError(f"token ids must be [T] or [n, T]; found {tuple(texts.shape)}")
        return list(texts) if texts.dim() == 2 else [texts]
    items: list[Any] = list(texts)
    return [items] if items and all(isinstance(item, int) for item in items) else items


def _ids(text: Text, tokenizer: Any) -> Tensor:
    if isinstance(text, str):
        return encode(text, tokenizer)
    ids = torch.as_tensor(text)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(f"token ids must be whole numbers; found {ids.dtype}")
    return ids.reshape(-1).to(torch.int64)


def _shipped_rows(tokenizer: Any, needed: int, device: torch.device, limit: int | None) -> list[Tensor]:
    """A row a shipped text, in their order; where one is too short, the next ones follow it."""
    encoded = [encode(text, tokenizer) for text in evaluation_texts()]
    rows = []
    for start in range(min(limit or len(encoded), len(encoded))):
        ids = torch.cat(encoded[start:] + encoded[:start])
        if ids.numel() < needed:
            raise InputError(f"the shipped texts have {ids.numel()} tokens together and {needed} are needed; use fewer")
        rows.append(ids[None, :needed].to(device))
    return rows
