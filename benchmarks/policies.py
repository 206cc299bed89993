"""What eviction policies keep, and what they cost: divergence in decode, needles and CPU time. Real model, no hub.

    python benchmarks/policies.py [--texts 8] [--steps 64] [--needles 12] [--budget 0.5 0.25] [--only h2o tova]

(``eviction.py`` compares the learned policy with a few others for a tenth of the time: they share a prefill, nothing is timed.)
Survivors stay in full precision, so that nothing but the eviction is measured. Every policy reads the same texts side by
side and is compared with one run of the exact cache. Times are the process's, not the clock's, so that a busy machine does
not change them: ``prefill`` of all texts together, and a decode ``step`` of all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from fade_core import create_tiered_cache, list_plugins, load_model
from fade_core.models.loading import exact_cache
from fade_eval.decode import prefill
from fade_eval.haystack import ask, judge, needle_prompts
from fade_eval.kl import exact_runs, follow, summarise
from fade_eval.texts import passages

REPEAT = "\n\nRepeat the previous context exactly.\n\n"


def policies(tokenizer: Any) -> dict[str, dict[str, Any]]:
    kvzip = {"kind": "kvzip", "instruction": tokenizer(REPEAT, add_special_tokens=False)["input_ids"]}
    plain = {
        kind: {"kind": kind}
        for kind in (
            *("position", "h2o", "ema", "normalised_h2o", "snapkv", "tova"),
            *("expected_attention", "key_norm", "keydiff"),
        )
    }
    heads = {
        f"{kind} + heads": {"kind": "adakv", "base": {"kind": kind}}
        for kind in ("normalised_h2o", "snapkv", "expected_attention")
    }
    found = plain | heads | {"kvzip": kvzip, "kvzip + heads": {"kind": "adakv", "floor": 0.0, "base": kvzip}}
    if any(plugin.dist == "fade-policy-learned" for plugin in list_plugins()):
        found |= {"learned": {"kind": "learned", "heads": "equal"}, "learned + heads": {"kind": "learned"}}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--needles", type=int, default=12)
    parser.add_argument("--budget", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--split", default="evaluation", choices=["evaluation", "unlike", "calibration"])
    parser.add_argument("--only", nargs="+", help="names of policies; default: all")
    parser.add_argument("--device", default="cpu", help="cpu, cuda; on a GPU the times are those of the host alone")
    parser.add_argument("--output", type=Path, default=Path("policies.json"))
    wanted = parser.parse_args()
    model, tokenizer = load_model(wanted.model, dtype=torch.float32, device=wanted.device)
    texts = [passage.text for passage in passages(wanted.split)]
    spread = texts[:: max(1, len(texts) // wanted.texts)][: wanted.texts]  # of every work, not the first ones alone
    (run,) = exact_runs(
        model,
        spread,
        tokenizer=tokenizer,
        prompt_tokens=wanted.prompt,
        steps=wanted.steps,
        batch_size=wanted.texts,
    )
    print(f"{len(run.ids)} texts of the split {wanted.split}, {wanted.prompt} + {wanted.steps} tokens, {model.dtype}")
    prompts = needle_prompts(tokenizer, wanted.needles, wanted.prompt) if wanted.needles else []
    exact = [ask(model, prompt, exact_cache) for prompt in prompts]
    rows: list[dict[str, Any]] = []
    for budget in wanted.budget:
        for name, policy in policies(tokenizer).items():
            if wanted.only and name not in wanted.only:
                continue
            row = measured(model, name, {**policy, "budget": budget}, run, wanted.steps, prompts)
            if prompts:
                found = judge(tokenizer, prompts, row.pop("answers"), exact, model.dtype.itemsize)
                row |= {"needles": found.kept, "asked": found.exact_found}
            rows.append(row)
            wanted.output.write_text(json.dumps(rows, indent=2), encoding="utf-8")
            print(
                f"| {budget:.0%} | {name} | {row['kl']:.4f} ± {row['kl_error']:.4f} | {row['top1']:.3f} | "
                f"{row['perplexity']:+.1%} | {row.get('needles', 0)} of {row.get('asked', 0)} | {row['prefill']:.1f} s | "
                f"{1000 * row['step']:.0f} ms |",
                flush=True,
            )


def measured(model: Any, name: str, policy: dict[str, Any], run: Any, steps: int, prompts: list[Any]) -> dict[str, Any]:
    def fresh(model: Any) -> Any:
        return create_tiered_cache(model, ladder=[{"tier": "fp16"}], policy=policy)

    with fresh(model) as cache:
        started = time.process_time()
        prefill(model, run.ids[:, : run.prompt_tokens], cache)
        read = time.process_time()
        followed = follow(model, cache, run)
        decoded = time.process_time()
    found = summarise(followed, run.prompt_tokens, steps)
    return {
        "policy": name,
        "budget": policy["budget"],
        "kl": found.kl_mean,
        "kl_error": found.kl_standard_error,
        "kl_p99": found.kl_p99,
        "top1": found.top1_agreement,
        "perplexity": found.perplexity_change,
        "held": found.held.cache,
        "prefill": read - started,
        "step": (decoded - read) / steps,
        "answers": [ask(model, prompt, fresh) for prompt in prompts],
    }


if __name__ == "__main__":
    main()
