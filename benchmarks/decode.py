"""What one decode step of ``generate`` costs with DynamicCache, a compiled StaticCache and a compiled FADE cache.

    python benchmarks/decode.py [--batch 1 --context 32768] [--steps 160 --warmup 32] [--config safe|FILE] [--tiny]

The model has the shape of Llama-3.1-8B (``--tiny``: two layers of 64 channels a head) and random weights: time does not
depend on their values. Steps are timed inside ``generate``, which waits for each token; the first ``--warmup`` steps hold
compilation and the recording of CUDA graphs and are left out. ``mean`` counts the steps in which a tile is encoded,
``median`` hides them.

Parity comes first, on a text that is given token by token: the compiled FADE cache has to stay as close to the growing,
eager one as StaticCache, compiled, stays to DynamicCache (twice that distance, and float32's rounding). No time is
measured where it does not.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    StaticCache,
    StoppingCriteria,
)
from transformers.cache_utils import Cache

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.memory import live_bytes

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 131_072,
    },
}  # fmt: skip


DYNAMIC, STATIC = "DynamicCache, eager", "StaticCache, compiled"
GROWING, FIXED = "FADE growing, eager", "FADE fixed, compiled"


class Clock(StoppingCriteria):
    """Notes when each token was there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, list[float]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Dictate(LogitsProcessor):
    """Makes ``generate`` write a given text, so that all caches read the same.

    Args:
        text: int64 ``[steps]``.
        start: tokens before it.
    """

    def __init__(self, text: Tensor, start: int) -> None:
        self.text, self.start = text, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.text[input_ids.shape[1] - self.start]
        return torch.zeros_like(scores).index_fill_(1, token.view(1), 1.0)


@dataclass(frozen=True)
class Run:
    """One call of ``generate``: milliseconds a step, logits ``[steps, B, vocabulary]`` if asked for, bytes of the cache."""

    milliseconds: list[float]
    logits: Tensor | None
    nbytes: int
    kernels: str


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--batch", type=int, default=1)
    arguments.add_argument("--context", type=int, default=32_768)
    arguments.add_argument("--steps", type=int, default=160, help="timed steps; at least two tiles")
    arguments.add_argument("--warmup", type=int, default=32)
    arguments.add_argument("--config", default="safe", help="safe, balanced or a configuration file")
    arguments.add_argument("--kernel", default="auto", help="implementation of every op: auto, torch, triton")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--backend", help="of torch.compile; inductor on a GPU, aot_eager (no compiler) on a CPU")
    arguments.add_argument("--tiny", action="store_true", help="a small model in float32: does it run at all?")
    wanted = arguments.parse_args()
    device = torch.device(wanted.device)
    dtype = torch.float32 if wanted.tiny else torch.bfloat16
    torch.manual_seed(0)
    with device:
        shape = LlamaConfig(**SHAPES["tiny" if wanted.tiny else "llama-3.1-8b"], eos_token_id=None, pad_token_id=0)
        model = LlamaForCausalLM._from_config(shape, dtype=dtype).eval()
        prompt = torch.randint(1, shape.vocab_size, (wanted.batch, wanted.context))
    total = wanted.context + wanted.warmup + wanted.steps + 1
    found = FadeConfig.from_file(wanted.config) if "." in wanted.config else getattr(FadeConfig, wanted.config)()
    config = found.with_overrides(kernel={"kind": wanted.kernel})

    def fade(length: int | None) -> Callable[[], TieredKVCache]:
        return lambda: create_tiered_cache(model, config, max_cache_len=length)

    makers: dict[str, Callable[[], Cache]] = {
        DYNAMIC: lambda: DynamicCache(config=shape),
        STATIC: lambda: StaticCache(config=shape, max_cache_len=total),
        GROWING: fade(None),
        FIXED: fade(total),
    }
    compiled = compile_config(device, wanted.backend)

    def run(name: str, steps: int, forced: Tensor | None) -> Run:
        cache = makers[name]()
        if name in (STATIC, FIXED) and not cache.is_compileable:
            raise SystemExit(f"{name}: {getattr(cache, 'compile_refusal', 'cannot be compiled')}")
        clock = Clock(device)
        settings = {"compile_config": compiled} if name in (STATIC, FIXED) else {"disable_compile": True}
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=steps,
            do_sample=False,
            stopping_criteria=[clock],
            logits_processor=[Dictate(forced, wanted.context)] if forced is not None else None,
            return_dict_in_generate=True,
            output_logits=forced is not None,
            **settings,
        )
        kernels = ""
        if isinstance(cache, TieredKVCache):
            cache.detach()
            layer = cache.tiered[0]
            kernels = f"{layer.step_plan.append.name}, {layer.step_plan.attention.name}" if name == FIXED else ""
        logits = torch.stack(out.logits[1:]).float().cpu() if out.logits is not None else None
        milliseconds = [1e3 * (after - before) for before, after in itertools.pairwise(clock.times)]
        return Run(milliseconds, logits, live_bytes(cache), kernels)

    text = torch.randint(1, shape.vocab_size, (wanted.warmup + wanted.steps,), device=device)
    checked = min(2 * config.tile + 8, len(text))
    logits = {name: run(name, checked, text).logits for name in makers}
    ours, theirs = distance(logits[FIXED], logits[GROWING]), distance(logits[STATIC], logits[DYNAMIC])
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{where}, torch {torch.__version__}, batch {wanted.batch} x {wanted.context} tokens, kernels: {wanted.kernel}"
    )
    print(f"parity over {checked} tokens: FADE {ours:.2e}, StaticCache {theirs:.2e} from their eager, growing cousins")
    if ours > 2 * theirs + 1e-5:
        print("the compiled cache computes something else: no time is worth measuring", file=sys.stderr)
        return 1
    print(f"{'cache':24}{'median ms':>11}{'mean ms':>11}{'longest':>11}{'cache MB':>11}  append, attention")
    for name in makers:
        found = run(name, wanted.warmup + wanted.steps, None)
        steps = found.milliseconds[wanted.warmup :]
        print(
            f"{name:24}{statistics.median(steps):11.2f}{statistics.mean(steps):11.2f}{max(steps):11.2f}"
            f"{found.nbytes / 1e6:11.1f}  {found.kernels}"
        )
    return 0


def compile_config(device: torch.device, backend: str | None) -> CompileConfig:
    """Whole graphs; CUDA graphs on a GPU, any device allowed."""
    on_gpu = device.type == "cuda"
    config = CompileConfig(
        fullgraph=True,
        dynamic=None,
        backend=backend or ("inductor" if on_gpu else "aot_eager"),
        mode="reduce-overhead" if on_gpu else None,
    )
    config._compile_all_devices = True
    return config


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative distance of logits."""
    return float((found - wanted).norm() / wanted.norm())


if __name__ == "__main__":
    sys.exit(main())
