"""Time between tokens of FADE's decode loop, by events on the device, so that nobody waits for a token; beside StaticCache.

    python benchmarks/loop.py [--shape llama-3.1-8b] [--batch 8] [--context 8192] [--config safe balanced] [--growing]

Random weights. Parity is told by `fade bench decode --loop fade`, whose clock waits for every token.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache, StoppingCriteria, StoppingCriteriaList

from fade_core import create_tiered_cache, decode_loop
from fade_core.cache.named_caches import configuration
from fade_core.support.memory import live_bytes
from fade_eval.generating import compile_config
from fade_eval.shapes import SHAPES, random_model

WARMUP, STEPS = 40, 160


class Marks(StoppingCriteria):  # type: ignore[misc]
    """Notes on the device when each token is there."""

    looks_ahead = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.found = device, list[Any]()

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.found.append(event)
        else:
            self.found.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def between(self) -> list[float]:
        """Milliseconds from each token to the next."""
        if self.device.type != "cuda":
            return [1e3 * (after - before) for before, after in itertools.pairwise(self.found)]
        torch.cuda.synchronize(self.device)
        return [before.elapsed_time(after) for before, after in itertools.pairwise(self.found)]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--shape", choices=list(SHAPES), default="llama-3.1-8b")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--context", type=int, default=8192)
    arguments.add_argument("--config", nargs="+", default=["safe"])
    arguments.add_argument("--growing", action="store_true", help="without max_cache_len")
    arguments.add_argument("--asked", action="store_true", help="with an end token, that the loop asks for")
    wanted = arguments.parse_args()
    device = torch.device(wanted.device)
    model = random_model(wanted.shape, device)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(1, vocabulary - 1, (wanted.batch, wanted.context), device=device)
    longest = wanted.context + WARMUP + STEPS + 1

    def timed(name: str, make: Callable[[], Any], **options: Any) -> None:
        cache, marks = make(), Marks(device)
        options |= {"eos_token_id": vocabulary - 1, "pad_token_id": 0} if wanted.asked else {}
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=WARMUP + STEPS + 1,
            stopping_criteria=StoppingCriteriaList([marks]),
            **options,
        )
        took = marks.between()
        late = took[WARMUP:]
        if not late:
            print(f"{name:28s} ended after {len(took) + 1} tokens: give another --context")
            return
        held = live_bytes(cache, exclude=model) / 1e9
        print(
            f"{name:28s} {statistics.median(late):7.2f} ms, mean {statistics.mean(late):7.2f}, longest {max(late):7.1f}, first "
            f"{WARMUP}: {sum(took[:WARMUP]) / 1e3:5.2f} s, {held:.2f} GB"
        )

    for name in wanted.config:
        limit = None if wanted.growing else longest
        options = {"custom_generate": decode_loop, "record": True}
        timed(name, lambda name=name, limit=limit: create_tiered_cache(model, configuration(name), limit), **options)
    timed(
        "StaticCache, compiled",
        lambda: StaticCache(config=model.config, max_cache_len=longest),
        compile_config=compile_config(device),
    )


if __name__ == "__main__":
    main()
