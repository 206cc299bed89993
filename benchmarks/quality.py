"""Quality per bit: many formats on the same texts, in decode, with real packed storage. Real model, no hub.

    fade calibrate --model smollm2 --text ... -o calibration.safetensors
    python benchmarks/quality.py --calibration calibration.safetensors [--texts 20] [--steps 128] [--csv out.csv]

Every text is read once with the exact cache; each format then decodes the same tokens, and its next-token distributions
are compared with the exact ones. ``bits`` is what a packed element takes with all its metadata, averaged over layers,
keys and values; ``smaller`` is how much less the whole cache held at the end than 16-bit K/V of the same tokens (sinks,
window, transforms and book-keeping included).
transformers' own QuantizedCache runs beside them where its backends (optimum-quanto, hqq) are installed.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fade_core import FadeConfig, create_tiered_cache, load_model
from fade_core.eval import kl
from fade_core.texts import passages

Factory = Callable[[Any], Any]


def rotated(key_bits: int, value_bits: int, **fields: Any) -> dict[str, Any]:
    return {
        "keys": {"kind": "rotated", "bits": key_bits, **fields},
        "values": {"kind": "rotated", "bits": value_bits, **fields},
    }


def calibrated(file: str, bits: float, **fields: Any) -> dict[str, Any]:
    side = {"kind": "calibrated", "file": file, "bits": bits, **fields}
    return {"keys": side, "values": side}


def uniform(bits: int, **keys: Any) -> dict[str, Any]:
    return {"keys": {"kind": "uniform", "bits": bits, **keys}, "values": {"kind": "uniform", "bits": bits}}


def kivi(bits: int) -> dict[str, Any]:
    return {
        "keys": {"kind": "uniform", "bits": bits, "axis": "channel", "group": 32},
        "values": {"kind": "uniform", "bits": bits, "group": 32},
    }


def recipes(calibration: str | None) -> dict[str, dict[str, Any]]:
    """Name to fields of a ``FadeConfig``."""
    found = {
        "int4 per token": uniform(4),
        "int2 per token": uniform(2),
        "KIVI 4": kivi(4),
        "KIVI 2": kivi(2),
        "Hadamard + int4": rotated(4, 4, codes="uniform"),
        "TurboQuant 4": rotated(4, 4, codes="lloyd-max"),
        "TurboQuant 3": rotated(3, 3),
        "TurboQuant 2": rotated(2, 2),
        "rotated K4V2, no calibration": rotated(4, 2, codes="lloyd-max", metadata="log8"),
        "rotated K3V2, no calibration": rotated(3, 2, codes="lloyd-max", metadata="log8"),
    }
    if calibration:
        for bits in (4.5, 3.5, 2.5, 2.1, 1.65):
            found[f"calibrated {bits}"] = calibrated(calibration, bits)
        found["calibrated 2.2, widths 0 2 4 in groups of 16"] = calibrated(calibration, 2.2, widths=[0, 2, 4], group=16)
    return found


def peers() -> dict[str, Factory]:
    """transformers' QuantizedCache with every backend that is installed."""
    from transformers import QuantizedCache

    found: dict[str, Factory] = {}
    for backend, package, widths in (("quanto", "optimum.quanto", (4, 2)), ("hqq", "hqq", (4, 2))):
        if importlib.util.find_spec(package.split(".")[0]) is None:
            continue
        for bits in widths:

            def make(model: Any, backend: str = backend, bits: int = bits) -> Any:
                return QuantizedCache(backend, model.config, nbits=bits, residual_length=64)

            found[f"QuantizedCache {backend} int{bits}"] = make
    return found


def bits_of(model: Any, config: FadeConfig) -> float:
    """Average bits of a packed element over layers, keys and values."""
    with create_tiered_cache(model, config) as cache:
        tiers = [layer.plan.ladder.tiers[0] for layer in cache.tiered]
    both = [q.bits_per_element for tier in tiers for q in (tier.keys, tier.values)]
    return sum(both) / len(both)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--calibration", help="file that 'fade calibrate' wrote")
    parser.add_argument("--texts", type=int, default=20)
    parser.add_argument("--split", default="evaluation", choices=["evaluation", "unlike", "calibration"])
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--steps-per-forward", type=int, default=1, help="more is faster and close to it")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--only", nargs="+", help="recipes whose name contains one of these")
    parser.add_argument("--csv", type=Path)
    wanted = parser.parse_args()
    model, tokenizer = load_model(wanted.model)
    chosen: dict[str, tuple[float, Factory]] = {}
    for name, fields in recipes(wanted.calibration).items():
        if not wanted.only or any(part in name for part in wanted.only):
            config = FadeConfig(n_sink=4, recent_window=wanted.window, **fields)
            chosen[name] = (bits_of(model, config), lambda m, c=config: create_tiered_cache(m, c))
    if not wanted.only:
        chosen |= {name: (math.nan, factory) for name, factory in peers().items()}
    steps: dict[str, list[kl.Steps]] = {name: [] for name in chosen}
    texts = passages(wanted.split)[: wanted.texts]
    started = time.perf_counter()
    for number, passage in enumerate(texts):
        ids = tokenizer(passage.text, return_tensors="pt").input_ids.to(model.device)
        ids = ids[:, : wanted.prompt + wanted.steps + 1]
        if ids.shape[1] <= wanted.prompt + wanted.steps:
            sys.exit(f"{passage.name} has {ids.shape[1]} tokens; {wanted.prompt + wanted.steps + 1} are needed")
        exact = kl.run_exact(model, ids, wanted.prompt, steps_per_forward=wanted.steps_per_forward)
        for name, (_, factory) in chosen.items():
            steps[name] += kl.compare(model, factory, exact, steps_per_forward=wanted.steps_per_forward)
        print(f"{number + 1}/{len(texts)} {passage.name} {time.perf_counter() - started:.0f} s", file=sys.stderr)
    rows = []
    print(f"{len(texts)} texts, {wanted.prompt} + {wanted.steps} tokens, window {wanted.window}")
    print(f"{'format':46}{'bits':>7}{'KL':>10}{'+-':>9}{'p99':>8}{'top-1':>8}{'ppl':>9}{'smaller':>9}")
    for name, (bits, _) in chosen.items():
        found = kl.summarise(steps[name], wanted.prompt, wanted.steps)
        error = found.kl_standard_error or math.nan
        print(
            f"{name:46}{bits:7.3f}{found.kl_mean:10.5f}{error:9.5f}{found.kl_p99:8.3f}{found.top1_agreement:8.4f}"
            f"{found.perplexity_change:+9.2%}{1 / found.held.ratio_16bit:8.2f}x"
        )
        rows.append(
            {
                "format": name,
                "bits": bits,
                "kl": found.kl_mean,
                "kl_standard_error": error,
                "kl_p99": found.kl_p99,
                "top1": found.top1_agreement,
                "perplexity_change": found.perplexity_change,
                "smaller_than_16bit": 1 / found.held.ratio_16bit,
                "texts": len(texts),
            }
        )
    if wanted.csv:
        with wanted.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
