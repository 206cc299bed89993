"""From a user's text to the token ids of a prompt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fade_core.errors import InputError


def chat_ids(tokenizer: Any, text: str, raw: bool = False) -> Tensor:
    """int64 ``[1, T]`` of ``text`` as a user's message; as it is where ``raw`` or without a chat template."""
    if raw or not getattr(tokenizer, "chat_template", None):
        ids = tokenizer(text)["input_ids"]
    else:
        message = [{"role": "user", "content": text}]
        shown = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(shown, add_special_tokens=False)["input_ids"]
    if not ids:
        raise InputError("the prompt is empty")
    return torch.tensor([ids])


def document_ids(tokenizer: Any, document: str, question: str, limit: int | None) -> Tensor:
    """A question after a document as a user's message ``[1, T]``, the document's end cut so that ``T <= limit``.

    Raises:
        InputError: if even the question alone is longer than ``limit``.
    """

    def with_tokens(count: int) -> Tensor:
        cut = tokenizer.decode(tokens[:count]) if count < len(tokens) else document
        return chat_ids(
            tokenizer, f"{cut}\n\nAnswer the question about the text above in one short sentence. {question}"
        )

    tokens = tokenizer(document, add_special_tokens=False)["input_ids"]
    ids = with_tokens(len(tokens))
    kept = len(tokens)
    while limit is not None and ids.shape[1] > limit:
        kept -= ids.shape[1] - limit
        if kept < 1:
            raise InputError(f"a prompt of {limit} tokens has no room for the question; use more")
        ids = with_tokens(kept)
    return ids
