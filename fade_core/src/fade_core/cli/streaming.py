"""Watching ``generate()`` token by token: text as it comes, and when each token came."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor


class TokenWatch:
    """A streamer for ``generate(streamer=...)`` that keeps the times of the tokens of one row.

    Args:
        tokenizer: decodes the text, or ``None`` to keep only times.
        on_text: called with each new piece of text.
        on_first: called when the first new token is there: the prompt has been read.

    Attributes:
        times: ``time.perf_counter()`` of every new token.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        on_text: Callable[[str], None] | None = None,
        on_first: Callable[[], None] | None = None,
    ) -> None:
        self.tokenizer, self.on_text, self.on_first = tokenizer, on_text, on_first
        self.times: list[float] = []
        self._ids: list[int] = []
        self._shown = ""
        self._prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt (first call) or new token ids."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        if not self.times and self.on_first is not None:
            self.on_first()
        self.times.append(time.perf_counter())
        self._ids += value.reshape(-1).tolist()
        self._show(final=False)

    def end(self) -> None:
        """Show what an unfinished character held back."""
        self._show(final=True)

    @property
    def tokens_per_second(self) -> float | None:
        """Rate of decoding, the prompt left out; ``None`` for fewer than two tokens."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])

    def _show(self, final: bool) -> None:
        if self.tokenizer is None or self.on_text is None:
            return
        text = self.tokenizer.decode(self._ids, skip_special_tokens=True)
        if not final and text.endswith("\ufffd"):
            return  # half of a character; the next token completes it
        self.on_text(text[len(self._shown) :])
        self._shown = text
