"""Perplexity of a long stream of text through a cache of bounded size, block by block. Real model, no hub.

    python benchmarks/streaming.py [--tokens 16384] [--budget 1024] [--chunk 128] [--block 1024] [--window 64]
        [--run contiguous keep exact fresh] [--quantizer fp16 int4] [--policy position] [--first 0]
        [--model smollm2]

The shipped evaluation texts are read one after the other, ``--chunk`` tokens a forward pass; each token is predicted from what
the cache still holds and the tokens of its own chunk before it. ``contiguous`` and ``keep`` hold ``--budget`` tokens (four
sinks and, with the default policy, the newest ones; a chunk comes on top) and differ in ``reposition`` alone; ``exact`` is
transformers' DynamicCache, which evicts nothing. ``fresh`` says how hard the text of each block is: an exact cache that has
read the ``--budget`` tokens before the block and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from fade_core import FadeConfig, create_tiered_cache, load_model
from fade_eval.texts import passages

RUNS = ["contiguous", "keep", "exact", "fresh"]
LADDERS = {"fp16": ({"tier": "fp16"},), "int4": ({"tier": "int4"},)}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--model", default="smollm2")
    arguments.add_argument("--tokens", type=int, default=16384)
    arguments.add_argument("--budget", type=int, default=1024)
    arguments.add_argument("--chunk", type=int, default=128)
    arguments.add_argument("--block", type=int, default=1024)
    arguments.add_argument("--window", type=int, default=64)
    arguments.add_argument("--policy", default="position")
    arguments.add_argument("--first", type=int, default=0, help="leave out the blocks before this token (fresh only)")
    arguments.add_argument("--run", nargs="+", default=["contiguous", "keep"], choices=RUNS)
    arguments.add_argument("--quantizer", nargs="+", default=["int4"], choices=list(LADDERS))
    wanted = arguments.parse_args()
    model, tokenizer = load_model(wanted.model)
    ids = stream(tokenizer, wanted.tokens + 1)
    trained = model.config.get_text_config().max_position_embeddings
    print(
        f"{wanted.model}, trained at {trained} tokens; {ids.shape[1] - 1} tokens in chunks of {wanted.chunk}; "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {model.dtype}"
    )
    plans = [(run, None) for run in wanted.run if run in ("exact", "fresh")]
    plans += [(run, name) for name in wanted.quantizer for run in wanted.run if run not in ("exact", "fresh")]
    for run, name in plans:
        label = run if name is None else f"{run} {name}"
        with opened(model, run, name, wanted) as cache:
            report(label, model, ids, cache, wanted)


def stream(tokenizer: Any, count: int) -> Tensor:
    """The first ``count`` tokens of the shipped texts, int64 ``[1, count]``."""
    texts = [p.text for p in (*passages("evaluation"), *passages("calibration"))]
    ids: Tensor = tokenizer("\n\n".join(texts), return_tensors="pt").input_ids
    if ids.shape[1] < count:
        raise SystemExit(f"the shipped texts have {ids.shape[1]} tokens; ask for fewer than {count}")
    return ids[:, :count]


@contextlib.contextmanager
def opened(model: Any, run: str, quantizer: str | None, wanted: argparse.Namespace) -> Iterator[Any]:
    """The cache of one run."""
    if quantizer is None:
        yield DynamicCache(config=model.config)
        return
    config = FadeConfig(
        recent_window=wanted.window,
        ladder=LADDERS[quantizer],
        policy={"kind": wanted.policy, "budget": wanted.budget, "every": 1},
        reposition=run,
    )
    with create_tiered_cache(model, config) as cache:
        yield cache


@torch.no_grad()
def report(label: str, model: Any, ids: Tensor, cache: Any, wanted: argparse.Namespace) -> None:
    """Print the perplexity of each block of the stream, and of all of it."""
    losses: list[float] = []
    first = wanted.first // wanted.block * wanted.block if label == "fresh" else 0
    shown, started = 0, time.perf_counter()
    for start in range(first, ids.shape[1] - 1, wanted.chunk):
        if label == "fresh" and start and not start % wanted.block:
            cache = DynamicCache(config=model.config)
            model(input_ids=ids[:, max(0, start - wanted.budget) : start], past_key_values=cache, logits_to_keep=1)
        part = ids[:, start : min(start + wanted.chunk, ids.shape[1] - 1)]
        logits = model(input_ids=part, past_key_values=cache, use_cache=True).logits[0].float()
        targets = ids[0, start + 1 : start + 1 + part.shape[1], None]
        losses += (-logits.log_softmax(-1).gather(1, targets)[:, 0]).tolist()
        while len(losses) >= shown + wanted.block:
            block = losses[shown : shown + wanted.block]
            shown += wanted.block
            held = kept(cache)
            end = first + shown
            print(f"{label:18}{end - wanted.block:>7} to {end:>7}  {perplexity(block):10.2f}  {held}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{label:18}all {len(losses)} tokens  {perplexity(losses):10.2f}  {seconds:.0f} s", flush=True)


def kept(cache: Any) -> str:
    """Most tokens that a layer holds, and the bytes of all."""
    if isinstance(cache, DynamicCache):
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        return f"{cache.get_seq_length()} tokens, {held / 1e6:.1f} MB"
    tokens = max(int((layer.held.tier_map() >= 0).sum(-1).max()) for layer in cache.tiered)
    return f"{tokens} tokens, {cache.compressed_storage_bytes() / 1e6:.1f} MB"


def perplexity(losses: list[float]) -> float:
    """``exp`` of the mean."""
    return math.exp(math.fsum(losses) / len(losses))


if __name__ == "__main__":
    main()
