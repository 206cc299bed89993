"""Whether a cache says the same by torch, kernels, compiled and recorded: the real model, a dictated text, KL to DynamicCache.

    python benchmarks/real_answers.py [--device cuda] [--rows 4] [--prompt 1024] [--steps 96] [--preset balanced aggressive]

In float16 on a GPU and float32 on a CPU. Random weights hide errors in noise; these do not.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from fade_core import FadeConfig, decode_loop, load_model
from fade_eval import generating
from fade_eval.texts import passages

WARMUP = 8
WAYS = (
    ("torch, growing", generating.GROWING, "torch"),
    ("kernels, growing", generating.GROWING, "auto"),
    ("kernels, compiled", generating.FIXED, "auto"),
    ("kernels, recorded", generating.RECORDED, "auto"),
)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--rows", type=int, default=4)
    arguments.add_argument("--prompt", type=int, default=1024)
    arguments.add_argument("--steps", type=int, default=96)
    arguments.add_argument("--preset", nargs="+", default=["balanced", "aggressive"])
    arguments.add_argument("--ways", nargs="+", default=["torch", "kernels", "compiled", "recorded"])
    wanted = arguments.parse_args()
    dtype = torch.float16 if wanted.device.startswith("cuda") else torch.float32
    model, tokenizer = load_model("smollm2", dtype=dtype, device=wanted.device)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    text = "\n".join(passage.text for passage in passages("evaluation"))
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0].to(wanted.device)
    rows = torch.stack([ids[row * 5000 : row * 5000 + wanted.prompt] for row in range(wanted.rows)])
    dictated = ids[wanted.prompt : wanted.prompt + WARMUP + wanted.steps + 1]

    def said(config: FadeConfig | None, cache: str) -> tuple[Tensor, generating.GenerateTime]:
        """Log-probabilities ``[steps, rows, vocabulary]``, and what the steps took."""
        work = generating.Work(wanted.rows, wanted.prompt, wanted.steps, WARMUP, checked=wanted.steps + WARMUP)
        runs = generating.Runs(model, work, custom_generate=decode_loop if cache == generating.RECORDED else None)
        runs.prompt, runs.text = rows, dictated
        found = runs.measured(cache, config)
        return found.logits[: wanted.steps].to(model.device).float().log_softmax(-1), found.time

    exact, _ = said(None, generating.DYNAMIC)
    for name in wanted.preset:
        for label, cache, kernel in WAYS:
            if not any(label.startswith(f"{way}, g") or label.endswith(way) for way in wanted.ways):
                continue
            config = FadeConfig.model_validate(FadeConfig.preset(name).model_dump() | {"kernel": {"kind": kernel}})
            found, took = said(config, cache)
            divergence = float((exact.exp() * (exact - found)).sum(-1).mean())
            print(
                f"{name:12s} {label:18s} KL {divergence:.5f}  {took.ms:7.2f} ms  {took.held_bytes / 1e6:.1f} MB  {took.kernels}"
            )


if __name__ == "__main__":
    main()
