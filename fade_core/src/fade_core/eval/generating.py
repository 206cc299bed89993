"""What a decode step of ``generate`` costs: transformers' caches and FADE's, growing and compiled, on one model.

All caches read the same dictated text, each in one call of ``generate``: that call gives its times and its logits. Parity
comes first: the compiled FADE cache has to stay as close to the growing, eager one as StaticCache, compiled, stays to
DynamicCache (twice that distance, and float32's rounding). Without it there are no times.
"""

from __future__ import annotations

import itertools
import statistics
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

from fade_core.cache import TieredKVCache, create_tiered_cache
from fade_core.config import FadeConfig
from fade_core.errors import InputError
from fade_core.eval.progress import Progress, Units
from fade_core.eval.results import EvalResult
from fade_core.eval.tokens import check_counts
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
"""Models with random weights: time does not depend on their values."""

DYNAMIC, STATIC = "DynamicCache", "StaticCache, compiled"
GROWING, FIXED = "FADE", "FADE, compiled"
OPS = {"append": ("append_kernel",), "attention": ("decode_kernel", "merge_kernel")}
"""Names of kernels by what they are for."""


@dataclass(frozen=True)
class GenerateTime(EvalResult):
    """Steps of ``generate`` with one cache.

    Attributes:
        ms: median milliseconds of a step after the warm-up; it hides the steps in which a tile is encoded.
        ms_mean: mean, which counts them.
        ms_longest: longest step.
        prefill_ms: from the call to the first token.
        warmup_ms: all steps of the warm-up together: compilation and the recording of CUDA graphs are in it.
        held_bytes: what the cache held at the end.
        kernels: implementations of ``append`` and ``decode_attention``; empty where no graph holds them.
    """

    ms: float
    ms_mean: float
    ms_longest: float
    prefill_ms: float
    warmup_ms: float
    held_bytes: int
    kernels: str = ""


@dataclass(frozen=True)
class Comparison(EvalResult):
    """All caches at one batch size and context.

    Attributes:
        batch: rows.
        context: tokens of the prompt.
        steps: timed steps.
        ours: relative distance of the compiled FADE cache's logits from the growing one's.
        theirs: of StaticCache's from DynamicCache's.
        graphs: graphs that were compiled while the timed steps ran; 0 if nothing was recompiled.
        times: by cache; empty where parity is not green.
        shares: share of a compiled FADE step's GPU time by op; empty if it was not profiled.
    """

    batch: int
    context: int
    steps: int
    ours: float
    theirs: float
    graphs: int
    times: dict[str, GenerateTime]
    shares: dict[str, float]

    @property
    def green(self) -> bool:
        """Whether the compiled cache computes what the growing one does."""
        return self.ours <= 2 * self.theirs + 1e-5


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token was there, and how many graphs had been compiled by then; calls ``at`` at some of them."""

    def __init__(self, device: torch.device, at: dict[int, Callable[[], None]] | None = None) -> None:
        self.device, self.at = device, at or {}
        self.times, self.graphs = list[float](), list[int]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.at.get(len(self.times), lambda: None)()
        self.times.append(time.perf_counter())
        self.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Dictate(LogitsProcessor):  # type: ignore[misc]
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


class Kept(LogitsProcessor):  # type: ignore[misc]
    """Keeps the first ``count`` logits ``[B, vocabulary]`` after the prompt's own."""

    def __init__(self, count: int, start: int) -> None:
        self.count, self.start, self.logits = count, start, list[Tensor]()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if 0 < input_ids.shape[1] - self.start <= self.count:
            self.logits.append(scores.clone())
        return scores


def random_model(shape: str, device: torch.device, dtype: torch.dtype) -> LlamaForCausalLM:
    """A Llama of one of ``SHAPES`` with random weights. Raises ``InputError`` for another name."""
    if shape not in SHAPES:
        raise InputError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")
    with device:
        config = LlamaConfig(**SHAPES[shape], eos_token_id=None, pad_token_id=0)
        return LlamaForCausalLM._from_config(config, dtype=dtype).eval()


def compile_config(device: torch.device, backend: str | None = None) -> CompileConfig:
    """Whole graphs; CUDA graphs on a GPU, any device allowed; on a CPU no compiler unless ``backend`` names one."""
    on_gpu = device.type == "cuda"
    config = CompileConfig(
        fullgraph=True,
        dynamic=None,
        backend=backend or ("inductor" if on_gpu else "aot_eager"),
        mode="reduce-overhead" if on_gpu else None,
    )
    config._compile_all_devices = True
    return config


def generate_times(
    model: Any,
    config: FadeConfig,
    *,
    batch: int = 1,
    context: int = 4096,
    steps: int = 160,
    warmup: int = 32,
    backend: str | None = None,
    profile: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> Comparison:
    """Time ``generate`` with DynamicCache, StaticCache, and FADE's cache growing and compiled, in one run.

    Args:
        model: a causal language model in evaluation mode.
        config: FADE's; it has to be one that compiles (``TieredKVCache.compile_refusal``).
        batch: rows.
        context: tokens of the random prompt.
        steps: timed steps of the compiled caches; two tiles or more show what encoding costs. Eager ones take as many as parity
            needs, after their warm-up.
        warmup: steps before, which hold compilation and the recording of CUDA graphs.
        backend: of ``torch.compile``.
        profile: run the compiled cache once more under torch's profiler, for ``shares``.
        seed: of prompt and text.
        progress: called as caches are done.

    Raises:
        InputError: for numbers below 1, or a configuration that does not compile.
    """
    check_counts(batch=batch, context=context, steps=steps, warmup=warmup)
    device = model.device
    if profile and device.type != "cuda":
        raise InputError("GPU time can be profiled on a GPU only; leave profile out")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    prompt = torch.randint(1, vocabulary, (batch, context), generator=generator).to(device)
    text = torch.randint(1, vocabulary, (warmup + steps + 1,), generator=generator).to(device)
    total, checked = context + warmup + steps + 2, min(2 * config.tile + 8, warmup + steps)

    def fade(length: int | None) -> TieredKVCache:
        cache = create_tiered_cache(model, config, max_cache_len=length)
        if length is not None and not cache.is_compileable:
            raise InputError(f"this cache cannot be compiled: {cache.compile_refusal}")
        return cache

    makers: dict[str, Callable[[], Cache]] = {
        DYNAMIC: lambda: DynamicCache(config=model.config),
        STATIC: lambda: StaticCache(config=model.config, max_cache_len=total),
        GROWING: lambda: fade(None),
        FIXED: lambda: fade(total),
    }
    compiled = compile_config(device, backend)
    advance = Units(len(makers) + 1 + profile, progress)

    def run(name: str, prompt: Tensor, steps: int, clock: Clock, kept: Kept) -> tuple[float, Cache]:
        cache = makers[name]()
        begun = time.perf_counter()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=steps + 1,
            do_sample=False,
            stopping_criteria=[clock],
            logits_processor=[kept, Dictate(text, prompt.shape[1])],
            **({"compile_config": compiled} if name in (STATIC, FIXED) else {"disable_compile": True}),
        )
        return 1e3 * (clock.times[0] - begun), cache

    run(DYNAMIC, prompt[:, : min(64, context)], 1, Clock(device), Kept(0, 0))  # libraries start up
    advance(1)
    times, logits, graphs = dict[str, GenerateTime](), dict[str, Tensor](), 0
    for name in makers:
        count = warmup + steps if name in (STATIC, FIXED) else checked
        clock, kept = Clock(device), Kept(checked, context)
        prefill, cache = run(name, prompt, count, clock, kept)
        kernels = ""
        if isinstance(cache, TieredKVCache):
            if name == FIXED:
                layer = cache.tiered[0]
                kernels = f"{layer.step_plan.append.name}, {layer.step_plan.attention.name}"
                graphs = clock.graphs[-1] - clock.graphs[warmup]
            cache.detach()
        took = [1e3 * (after - before) for before, after in itertools.pairwise(clock.times)]
        late = took[min(warmup, len(took) - 1) :]
        times[name] = GenerateTime(
            statistics.median(late),
            statistics.mean(late),
            max(late),
            prefill,
            sum(took[:warmup]),
            live_bytes(cache),
            kernels,
        )
        logits[name] = torch.stack(kept.logits).cpu()
        del cache, kept
        if device.type == "cuda":
            torch.cuda.empty_cache()
        advance(1)
    ours, theirs = distance(logits[FIXED], logits[GROWING]), distance(logits[STATIC], logits[DYNAMIC])
    found = Comparison(batch, context, steps, ours, theirs, graphs, times, {})
    if not found.green:
        return Comparison(batch, context, steps, ours, theirs, graphs, {}, {})
    if profile:
        steps_seen = min(2 * config.tile, steps - 1)
        shares = profiled(lambda clock, n: run(FIXED, prompt, n, clock, Kept(0, 0)), device, warmup, steps_seen)
        advance(1)
        return Comparison(batch, context, steps, ours, theirs, graphs, times, shares)
    return found


def profiled(run: Callable[[Clock, int], Any], device: torch.device, warmup: int, steps: int) -> dict[str, float]:
    """Shares of the GPU's busy time over ``steps`` steps after ``warmup``, by the names of kernels (``OPS``, the rest "other")."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities)
    run(Clock(device, {warmup: profiler.start, warmup + steps: profiler.stop}), warmup + steps + 1)
    busy = dict.fromkeys([*OPS, "other"], 0.0)
    for event in profiler.key_averages():
        if event.device_type.name == "CUDA":
            op = next((op for op, names in OPS.items() if any(name in event.key for name in names)), "other")
            busy[op] += event.self_device_time_total
    whole = sum(busy.values())
    return {op: part / whole for op, part in busy.items()} if whole else {}


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative distance of logits ``[steps, B, vocabulary]``."""
    gap = scale = 0.0
    for ours, theirs in zip(found, wanted, strict=True):  # step by step: in float32 they are large
        gap += float((ours.float() - theirs.float()).square().sum())
        scale += float(theirs.float().square().sum())
    return float((gap / scale) ** 0.5)
