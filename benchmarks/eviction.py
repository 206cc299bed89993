"""What evicting costs, policy by policy: KL, top-1 and perplexity after a prompt, everything kept in full precision.

    python benchmarks/eviction.py --split unlike --texts 4 --budget 0.5 --budget 0.25

Texts are decoded side by side and teacher-forced. A window of 64 tokens and 4 sinks stay whatever a policy says. The prompt
goes through the model once for all policies that observe the same queries: each cache then takes in its keys, values and
statistics as after a forward pass of its own. The steps go in at once, as policies rank again only after 64 of them; with
``--steps-per-forward 1`` they go one by one, and give the same.
"""

from __future__ import annotations

import argparse
from typing import Any, Literal

import torch

from fade_core import EvictionPolicy, FadeConfig, PolicyConfig, TieredKVCache, create_tiered_cache, load_model
from fade_eval.kl import exact_runs, follow, summarise
from fade_eval.texts import passages

POLICIES: dict[str, dict[str, Any]] = {
    "position": {"kind": "position"},
    "ema": {"kind": "ema"},
    "h2o": {"kind": "h2o"},
    "normalised h2o": {"kind": "normalised_h2o"},
    "normalised h2o, AdaKV": {"kind": "adakv", "base": {"kind": "normalised_h2o"}},
    "learned, heads equal": {"kind": "learned", "heads": "equal"},
    "learned": {"kind": "learned"},
    "learned, AdaKV's floor": {"kind": "adakv", "base": {"kind": "learned"}},
}


class Everything(EvictionPolicy):
    """Tracks what any of the policies reads."""

    statistics = ("mass", "seen", "ema", "last")

    def __init__(self, observes: int | Literal["all"]) -> None:
        self.observes = observes

    def score(self, view: Any) -> torch.Tensor:
        return view.statistic("mass")


class EverythingConfig(PolicyConfig):
    kind: Literal["everything"] = "everything"
    sees: int | Literal["all"] = "all"

    def build(self) -> Everything:
        return Everything(self.sees)


def config_of(policy: Any) -> FadeConfig:
    return FadeConfig(n_sink=4, recent_window=64, ladder=[{"tier": "fp16", "capacity": "rest"}], policy=policy)


@torch.no_grad()
def held_prompt(model: Any, ids: torch.Tensor, sees: int | Literal["all"]) -> TieredKVCache:
    """A cache that holds the prompt whole, with the statistics of the queries that it ``sees``."""
    cache = create_tiered_cache(model, config_of(EverythingConfig(budget=0.5, sees=sees)))
    for layer in cache.tiered:
        layer.holding = True
    cache.prefill(model, ids, logits_to_keep=1)
    return cache


def taken_over(model: Any, policy: dict[str, Any], held: TieredKVCache) -> TieredKVCache:
    """A cache under ``policy`` that has just been fed the prompt that ``held`` holds."""
    cache = create_tiered_cache(model, config_of(policy))
    for layer, source in zip(cache.tiered, held.tiered, strict=True):
        keys, values = source.window.decode(0), source.window.decode(1)
        layer.update(keys, values)
        (found,) = source.statistics()
        layer.settle(None, {name: found[name].clone() for name in cache.tracker.statistics})
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="unlike", choices=("unlike", "evaluation", "calibration"))
    parser.add_argument("--texts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--steps-per-forward", type=int, default=64)
    parser.add_argument("--budget", type=float, action="append", help="share of the context that is kept")
    parser.add_argument("--policy", action="append", choices=POLICIES, help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model("smollm2", dtype="float32", device="cpu")
    chosen = passages(options.split)[: options.texts]
    print(
        f"{options.split}: {', '.join(p.name for p in chosen)}; {options.prompt} + {options.steps} tokens", flush=True
    )
    (exact,) = exact_runs(
        model,
        [p.text for p in chosen],
        tokenizer=tokenizer,
        prompt_tokens=options.prompt,
        steps=options.steps,
        steps_per_forward=options.steps_per_forward,
        batch_size=options.texts,
    )
    print("| kept | policy | KL | top-1 | perplexity | KL of each text |\n|---|---|---|---|---|---|", flush=True)
    held: dict[Any, TieredKVCache] = {}
    for budget in options.budget or [0.5, 0.25]:
        for name in options.policy or POLICIES:
            policy = POLICIES[name] | {"budget": budget}
            sees = config_of(policy).policy.build().observes or FadeConfig().observation_window
            if sees not in held:
                held[sees] = held_prompt(model, exact.ids[:, : options.prompt], sees)
            with taken_over(model, policy, held[sees]) as cache, torch.no_grad():
                steps = follow(model, cache, exact, steps_per_forward=options.steps_per_forward)
            found = summarise(steps, options.prompt, options.steps)
            each = " ".join(f"{text.kl_mean:.4f}" for text in found.per_text)
            print(
                f"| {budget:.0%} | {name} | {found.kl_mean:.4f} ± {found.kl_standard_error or 0:.4f} "
                f"| {found.top1_agreement:.3f} | {found.perplexity_change:+.1%} | {each} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
