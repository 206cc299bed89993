"""Does a format last? Divergence from the exact cache along a long answer, teacher-forced, after one prompt.

    python benchmarks/long_answers.py --prompt 768 --tokens 1792 safe examples/self_calibrated.toml

Prints the mean KL of the first 256 tokens, of the last 512, and of each eighth.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import fade_eval
from fade_core import create_tiered_cache, load_model
from fade_core.cache.named_caches import configuration

CHUNK = 32
"""Tokens that are fed together."""


@torch.no_grad()
def log_probabilities(model: Any, cache: Any, ids: Tensor, prompt: int) -> Tensor:
    """Of every token after the prompt but the first ``[N, vocabulary]``, in float16: they are many."""
    model(ids[:, :prompt], past_key_values=cache, logits_to_keep=1)
    parts = ids[:, prompt:].split(CHUNK, 1)
    found = [model(part, past_key_values=cache).logits[0].float().log_softmax(-1).half() for part in parts]
    return torch.cat(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="+", help="presets or configuration files")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--prompt", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=1792)
    wanted = parser.parse_args()
    model, tokenizer = load_model(wanted.model, device="cpu", dtype="float32")
    texts = sorted((Path(fade_eval.__file__).parent / "data" / "texts").glob("evaluation-*.txt"))[8:]
    text = "\n".join(path.read_text() for path in texts)
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, : wanted.prompt + wanted.tokens]
    exact = log_probabilities(model, DynamicCache(config=model.config), ids, wanted.prompt)
    for name in wanted.configs:
        with create_tiered_cache(model, configuration(name)) as cache:
            found = log_probabilities(model, cache, ids, wanted.prompt)
        kl = (exact.float().exp() * (exact.float() - found.float())).sum(-1)
        eighths = " ".join(f"{float(part.mean()):.4f}" for part in kl.chunk(8))
        print(
            f"{name}: first 256 {float(kl[:256].mean()):.4f}, last 512 {float(kl[-512:].mean()):.4f}, by eighths {eighths}"
        )


if __name__ == "__main__":
    main()
