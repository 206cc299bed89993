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
from dataclasses import dataclass, replace
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
from fade_core.errors import InputError
from fade_core.support.memory import live_bytes
from fade_eval.progress import Progress, Units
from fade_eval.results import EvalResult
from fade_eval.tokens import check_counts

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

ON_CPU = ("tiny",)
"""Those that a machine without a GPU runs too."""

DYNAMIC, STATIC = "DynamicCache", "StaticCache, compiled"
GROWING, FIXED = "FADE", "FADE, compiled"
CACHES, COMPILED = (DYNAMIC, STATIC, GROWING, FIXED), (STATIC, FIXED)
OPS = {
    "append": ("append_kernel",),
    "attention": ("decode_kernel", "merge_kernel", "turn_kernel", "planes_kernel", "finish_kernel"),
}
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
    """A Llama of one of ``SHAPES`` with random weights.

    Raises:
        InputError: for another name, or a shape that is not ``ON_CPU`` where there is no GPU.
    """
    if shape not in SHAPES:
        raise InputError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")
    if device.type == "cpu" and shape not in ON_CPU:
        raise InputError(
            f"{shape} on a CPU: its weights alone take minutes to make and tens of gigabytes to hold; run it on a GPU, or "
            f"give --shape {' or '.join(ON_CPU)}"
        )
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
    if profile and model.device.type != "cuda":
        raise InputError("GPU time can be profiled on a GPU only; leave profile out")
    runs = _Runs(model, config, batch, context, warmup, steps, backend, seed)
    checked = min(2 * config.tile + 8, warmup + steps)
    advance = Units(len(CACHES) + 1 + profile, progress)
    runs.start_up()
    advance(1)
    times, logits, graphs = dict[str, GenerateTime](), dict[str, Tensor](), 0
    for name in CACHES:
        clock, kept = Clock(model.device), Kept(checked, context)
        times[name] = runs.timed(name, warmup + steps if name in COMPILED else checked, clock, kept)
        logits[name] = torch.stack(kept.logits).cpu()
        graphs = clock.graphs[-1] - clock.graphs[min(warmup, len(clock.graphs) - 1)]  # the last cache's: FIXED
        advance(1)
    ours, theirs = distance(logits[FIXED], logits[GROWING]), distance(logits[STATIC], logits[DYNAMIC])
    found = Comparison(batch, context, steps, ours, theirs, graphs, times, {})
    if not found.green:
        return replace(found, times={})
    if profile:
        found = replace(found, shares=profiled(runs, min(2 * config.tile, steps - 1)))
        advance(1)
    return found


class _Runs:
    """Calls of ``generate`` on one prompt and one dictated text; arguments as ``generate_times``."""

    def __init__(
        self,
        model: Any,
        config: FadeConfig,
        batch: int,
        context: int,
        warmup: int,
        steps: int,
        backend: str | None,
        seed: int,
    ) -> None:
        self.model, self.config, self.warmup, self.device = model, config, warmup, model.device
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config().vocab_size
        self.prompt = torch.randint(1, vocabulary, (batch, context), generator=generator).to(self.device)
        self.text = torch.randint(1, vocabulary, (warmup + steps + 1,), generator=generator).to(self.device)
        self.longest = context + warmup + steps + 2
        self.compiled = compile_config(self.device, backend)

    def make(self, name: str) -> Cache:
        """A new cache. Raises ``InputError`` if the configuration's cannot be compiled."""
        if name == DYNAMIC:
            return DynamicCache(config=self.model.config)
        if name == STATIC:
            return StaticCache(config=self.model.config, max_cache_len=self.longest)
        cache = create_tiered_cache(self.model, self.config, max_cache_len=self.longest if name == FIXED else None)
        if name == FIXED and not cache.is_compileable:
            raise InputError(f"this cache cannot be compiled: {cache.compile_refusal}")
        return cache

    @torch.no_grad()
    def start_up(self) -> None:
        """Read a short prompt eagerly with every cache, so that libraries and kernels are there when prompts are timed."""
        short = self.prompt[:, : 3 * self.config.tile + self.config.n_sink + self.config.recent_window]
        for name in CACHES:
            cache = self.make(name)
            self.model(short, past_key_values=cache, logits_to_keep=1)
            _detach(cache)

    def generate(self, name: str, steps: int, clock: Clock, kept: Kept) -> tuple[float, Cache]:
        """Milliseconds to the first token, and the cache."""
        cache = self.make(name)
        begun = time.perf_counter()
        self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            past_key_values=cache,
            max_new_tokens=steps + 1,
            do_sample=False,
            stopping_criteria=[clock],
            logits_processor=[kept, Dictate(self.text, self.prompt.shape[1])],
            **({"compile_config": self.compiled} if name in COMPILED else {"disable_compile": True}),
        )
        return 1e3 * (clock.times[0] - begun), cache

    def timed(self, name: str, steps: int, clock: Clock, kept: Kept) -> GenerateTime:
        """One call, ``steps`` steps of it behind the prompt."""
        prefill, cache = self.generate(name, steps, clock, kept)
        kernels = ""
        if isinstance(cache, TieredKVCache) and name == FIXED:
            plan = cache.tiered[0].steps.step_plan
            kernels = f"{plan.append.name}, {plan.attention.name}"
        took = [1e3 * (after - before) for before, after in itertools.pairwise(clock.times)]
        late = took[min(self.warmup, len(took) - 1) :]
        middle, mean, held = statistics.median(late), statistics.mean(late), live_bytes(cache)
        _detach(cache)
        del cache
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return GenerateTime(middle, mean, max(late), prefill, sum(took[: self.warmup]), held, kernels)


def _detach(cache: Cache) -> None:
    if isinstance(cache, TieredKVCache):
        cache.detach()


def profiled(runs: _Runs, steps: int) -> dict[str, float]:
    """Shares of the GPU's busy time over ``steps`` compiled steps after the warm-up, by the names of kernels in ``OPS``."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True)
    clock = Clock(runs.device, {runs.warmup: profiler.start, runs.warmup + steps: profiler.stop})
    _, cache = runs.generate(FIXED, runs.warmup + steps + 1, clock, Kept(0, 0))
    _detach(cache)
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
