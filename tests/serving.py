"""A server in miniature: prompts are run alone, decoded together, and leave as they are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache


@dataclass
class Request:
    """A prompt ``[T]`` and how many tokens it wants; ``said`` grows by one a step."""

    prompt: Tensor
    wanted: int
    said: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.said) >= self.wanted


@dataclass
class Server:
    """Decodes the rows of one cache together."""

    model: PreTrainedModel
    cache: TieredKVCache
    rows: list[Request] = field(default_factory=list)

    def admit(self, request: Request, spare: TieredKVCache, chunk: int | None = None) -> tuple[int, int]:
        """Run a prompt through ``spare`` alone and let it join."""
        out = spare.prefill(self.model, request.prompt[None], chunk=chunk)
        request.said.append(int(out.logits[0, -1].argmax()))
        self.rows.append(request)
        return self.cache.add_rows(spare)

    @torch.no_grad()
    def admit_together(self, requests: list[Request]) -> None:
        """Run several prompts at once, padded on the left, through the empty cache."""
        width = max(len(r.prompt) for r in requests)
        ids = torch.stack([torch.nn.functional.pad(r.prompt, (width - len(r.prompt), 0)) for r in requests])
        mask = torch.stack(
            [torch.nn.functional.pad(torch.ones_like(r.prompt), (width - len(r.prompt), 0)) for r in requests]
        )
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        out = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, use_cache=True
        )
        for request, logits in zip(requests, out.logits[:, -1], strict=True):
            request.said.append(int(logits.argmax()))
        self.rows = list(requests)

    @torch.no_grad()
    def step(self) -> None:
        """One token for every row."""
        length, padding = self.cache.get_seq_length(), self.cache.leading_padding[:, None]
        out = self.model(
            input_ids=torch.tensor([[r.said[-1]] for r in self.rows]),
            attention_mask=(torch.arange(length + 1) >= padding).long(),
            position_ids=length - padding,
            past_key_values=self.cache,
            use_cache=True,
        )
        for request, logits in zip(self.rows, out.logits[:, -1], strict=True):
            request.said.append(int(logits.argmax()))

    def dismiss(self) -> int:
        """Let rows that are done leave; says how many columns were cut off."""
        staying = [i for i, r in enumerate(self.rows) if not r.done]
        if len(staying) == len(self.rows):
            return 0
        self.rows = [self.rows[i] for i in staying]
        if not staying:
            self.cache.reset()
            return 0
        return self.cache.keep_rows(staying)


def alone(model: PreTrainedModel, config: FadeConfig, request: Request) -> list[int]:
    """What ``generate`` says to the prompt in a cache of its own."""
    ids = request.prompt[None]
    with create_tiered_cache(model, config) as cache:
        out: Tensor = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=request.wanted,
            min_new_tokens=request.wanted,
        )
    return [int(token) for token in out[0, ids.shape[1] :]]


def serve(
    server: Server, waiting: list[Request], spare: TieredKVCache, most: int, watch: Callable[[], None] = lambda: None
) -> None:
    """Until all are done: at most ``most`` rows at once, the next joins as soon as one leaves."""
    while server.rows or waiting:
        while waiting and len(server.rows) < most:
            server.admit(waiting.pop(0), spare)
        server.step()
        server.dismiss()
        watch()
