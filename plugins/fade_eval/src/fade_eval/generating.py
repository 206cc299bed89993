"""What a decode step of ``generate`` costs: transformers' caches and FADE's, growing and compiled, on one model.

All caches read the same dictated text, each in one call of ``generate``: that call gives its times and its logits. Parity
comes first: the compiled FADE cache has to stay as close to the growing, eager one as StaticCache, compiled, stays to
DynamicCache (twice that distance, and float32's rounding). Without it there are no times.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LogitsProcessor, StaticCache, StoppingCriteria
from transformers.cache_utils import Cache

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.errors import FadeError, InputError
from fade_core.support.memory import live_bytes
from fade_eval.profiling import PROFILED, Kernels, can_profile
from fade_eval.progress import Progress, Units
from fade_eval.results import EvalResult
from fade_eval.tokens import check_counts

DYNAMIC, STATIC = "DynamicCache", "StaticCache, compiled"
GROWING, FIXED = "FADE", "FADE, compiled"
RECORDED, GROWING_RECORDED = "FADE, recorded", "FADE, growing, recorded"
"""Run by a decode loop that was given, with ``max_cache_len`` and without."""
COMPILED = (STATIC, FIXED)
SHORT = 256
"""Tokens of the prompt that transformers' caches read before they are timed."""


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
        busy_ms: milliseconds of a step in which the GPU ran a kernel, median of ``PROFILED`` steps after the timed ones;
            kernels that overlap count once. ``None`` if they were not profiled, or the profiler saw none.
        shares: share of the kernels' time by op in those steps, FADE's caches only.
    """

    ms: float
    ms_mean: float
    ms_longest: float
    prefill_ms: float
    warmup_ms: float
    held_bytes: int
    kernels: str = ""
    busy_ms: float | None = None
    shares: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FadeTimes(EvalResult):
    """FADE's caches of one configuration.

    Attributes:
        ours: relative distance of the compiled cache's logits from the growing one's; with a loop the larger one of its two.
        green: whether that is close enough: ``ours <= 2 * theirs + 1e-5``.
        graphs: graphs that were compiled while the timed steps ran; 0 if nothing was recompiled.
        times: by cache; empty where parity is not green.
    """

    ours: float
    green: bool
    graphs: int
    times: dict[str, GenerateTime]


@dataclass(frozen=True)
class Comparison(EvalResult):
    """All caches on one model, at one batch size and context; some of them, as long as it is being measured.

    Attributes:
        shape: of the model.
        batch: rows.
        context: tokens of the prompt.
        steps: timed steps.
        theirs: relative distance of StaticCache's logits from DynamicCache's; ``None`` before both are measured.
        times: of transformers' caches, by cache.
        configs: FADE's caches, by the name of their configuration.
        left_out: why caches, or configurations, were not measured.
    """

    shape: str
    batch: int
    context: int
    steps: int
    theirs: float | None = None
    times: dict[str, GenerateTime] = field(default_factory=dict)
    configs: dict[str, FadeTimes] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Comparison:
        """What ``to_dict`` gave. Raises ``TypeError`` or ``KeyError`` for anything else."""
        configs = {
            name: FadeTimes(**(config | {"times": _times(config["times"])}))
            for name, config in found["configs"].items()
        }
        return cls(**(dict(found) | {"times": _times(found["times"]), "configs": configs}))

    def missing(self, configs: Sequence[str]) -> list[str]:
        """Caches and configurations that are still to be measured."""
        theirs = [name for name in (DYNAMIC, STATIC) if name not in self.times]
        return theirs + [name for name in configs if name not in self.configs]


def _times(found: Mapping[str, Any]) -> dict[str, GenerateTime]:
    return {name: GenerateTime(**time) for name, time in found.items()}


class Clock(StoppingCriteria):  # type: ignore[misc]
    """Notes when each token was there, and how many graphs had been compiled by then; then calls ``at`` at some of them."""

    def __init__(self, device: torch.device, at: Mapping[int, Callable[[], None]]) -> None:
        self.device, self.at = device, at
        self.times, self.graphs = list[float](), list[int]()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.times.append(time.perf_counter())
        self.graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        self.at.get(len(self.times) - 1, lambda: None)()  # what it takes counts to the step after
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
    configs: Mapping[str, FadeConfig],
    *,
    shape: str = "",
    batch: int = 1,
    context: int = 4096,
    steps: int = 160,
    warmup: int = 32,
    backend: str | None = None,
    profile: bool | None = None,
    seed: int = 0,
    known: Comparison | None = None,
    measured: Callable[[Comparison], None] | None = None,
    progress: Progress | None = None,
    custom_generate: Callable[..., Any] | None = None,
) -> Comparison:
    """Time ``generate`` with DynamicCache and StaticCache once, and with FADE's two caches of each configuration.

    Args:
        model: a causal language model in evaluation mode.
        configs: FADE's, by name. One that cannot be compiled on this model (``TieredKVCache.compile_refusal``) is left out;
            if that is all of them, nothing is measured.
        shape: what the result calls the model.
        batch: rows.
        context: tokens of the random prompt.
        steps: timed steps of the compiled caches; two tiles or more show what encoding costs. Eager ones take as many as parity
            needs, after their warm-up.
        warmup: steps before, which hold compilation and the recording of CUDA graphs.
        backend: of ``torch.compile``.
        profile: profile a few more steps of each cache, for ``busy_ms``; ``None``: on a GPU.
        seed: of prompt and text.
        known: what was measured before, with the same arguments: it is not measured again.
        measured: called with what is known whenever that is more: after each of transformers' caches, and after a
            configuration's two, of which no time is told without parity.
        progress: called as caches are done.
        custom_generate: a decode loop (as ``generate`` takes it) that runs FADE's caches, growing and of fixed size, where else
            a compiled one is measured. It has to call the stopping criteria after every token: they are the clock.

    Raises:
        InputError: for numbers below 1, or a profile where there is no GPU.
    """
    check_counts(batch=batch, context=context, steps=steps, warmup=warmup)
    if profile and not can_profile(model.device):
        raise InputError("GPU time can be profiled on a GPU only; leave profile out")
    checked = min(2 * max((config.tile for config in configs.values()), default=0) + 8, warmup + steps)
    work = Work(batch, context, steps, warmup, checked, can_profile(model.device) if profile is None else profile)
    runs = Runs(model, work, backend, seed, custom_generate)
    found = replace(known, left_out={}) if known else Comparison(shape, batch, context, steps)
    advance = Units(2 + (1 + len(runs.fast)) * len(configs), progress)

    def told(more: Comparison) -> Comparison:
        if measured is not None:
            measured(more)
        return more

    refused = {name: reason for name, config in configs.items() if (reason := runs.refusal(config))}
    found = replace(found, left_out=refused)
    if configs and len(refused) == len(configs):
        return told(found)
    if found.theirs is None:
        try:
            for more in runs.theirs(found):
                found = told(more)
                advance(1)
        except torch.OutOfMemoryError as error:
            return told(_without(found, STATIC if DYNAMIC in found.times else DYNAMIC, error))
    else:
        advance(2)
    for name, config in configs.items():
        if name not in found.configs and name not in refused:
            try:
                found = told(runs.ours(found, name, config))
            except torch.OutOfMemoryError as error:
                found = told(_without(found, name, error))
        advance(1 + len(runs.fast))
    return found


def _without(found: Comparison, name: str, error: torch.OutOfMemoryError) -> Comparison:
    return replace(found, left_out=found.left_out | {name: str(error).partition(". ")[0]})


@dataclass(frozen=True)
class Work:
    """What each cache does; arguments as ``generate_times``.

    Attributes:
        checked: steps whose logits are compared, and which eager caches take.
    """

    batch: int
    context: int
    steps: int
    warmup: int
    checked: int
    profile: bool = False


class Runs:
    """Calls of ``generate`` on one prompt and one dictated text; arguments as ``generate_times``."""

    def __init__(
        self,
        model: Any,
        work: Work,
        backend: str | None = None,
        seed: int = 0,
        custom_generate: Callable[..., Any] | None = None,
    ) -> None:
        self.model, self.work, self.device, self.custom_generate = model, work, model.device, custom_generate
        generator = torch.Generator().manual_seed(seed)
        vocabulary = model.config.get_text_config().vocab_size
        count = work.warmup + work.steps + PROFILED * work.profile
        self.prompt = torch.randint(1, vocabulary, (work.batch, work.context), generator=generator).to(self.device)
        self.text = torch.randint(1, vocabulary, (count + 1,), generator=generator).to(self.device)
        self.longest = work.context + count + 2
        self.compiled = compile_config(self.device, backend)

    def make(self, name: str, config: FadeConfig | None = None) -> Cache:
        """A new cache; ``config`` for FADE's."""
        if name == DYNAMIC:
            return DynamicCache(config=self.model.config)
        if name == STATIC:
            return StaticCache(config=self.model.config, max_cache_len=self.longest)
        return create_tiered_cache(
            self.model, config, max_cache_len=self.longest if name in (FIXED, RECORDED) else None
        )

    def refusal(self, config: FadeConfig) -> str:
        """Why a cache of this configuration cannot be made for the model, or not be compiled; empty if it can."""
        try:
            cache = self.make(FIXED, config)
        except FadeError as error:
            return str(error)
        refusal = cache.compile_refusal
        _detach(cache)
        return f"this cache cannot be compiled: {refusal}" if refusal else ""

    def theirs(self, found: Comparison) -> Iterator[Comparison]:
        """``found`` with DynamicCache, and then with StaticCache too."""
        self.start_up((DYNAMIC, STATIC), SHORT)
        eager = self.measured(DYNAMIC)
        yield (found := replace(found, times={DYNAMIC: eager.time}))
        compiled = self.measured(STATIC)
        yield replace(
            found, theirs=distance(compiled.logits, eager.logits), times=found.times | {STATIC: compiled.time}
        )

    def ours(self, found: Comparison, name: str, config: FadeConfig) -> Comparison:
        """``found`` with FADE's caches of ``config``, whose times are there if parity is green."""
        self.start_up((GROWING, FIXED), 3 * config.tile + config.n_sink + config.recent_window, config)
        eager = self.measured(GROWING, config)
        fast = {cache: self.measured(cache, config) for cache in self.fast}
        gap = max(distance(one.logits, eager.logits) for one in fast.values())
        green = found.theirs is not None and gap <= 2 * found.theirs + 1e-5
        times = {cache: one.time for cache, one in {GROWING: eager, **fast}.items()} if green else {}
        graphs = sum(one.graphs for one in fast.values())
        return replace(found, configs=found.configs | {name: FadeTimes(gap, green, graphs, times)})

    @property
    def fast(self) -> tuple[str, ...]:
        """FADE's caches that are measured beside the growing one, which runs every step as it is."""
        return (FIXED,) if self.custom_generate is None else (RECORDED, GROWING_RECORDED)

    @torch.no_grad()
    def start_up(self, names: Sequence[str], count: int, config: FadeConfig | None = None) -> None:
        """Read a short prompt eagerly with each cache, so that libraries and kernels are there when prompts are timed."""
        # as ``generate`` makes it before it reads the prompt: what is imported for it alone takes a second
        self.model.get_compiled_call(self.compiled)
        for name in names:
            cache = self.make(name, config)
            try:
                self.model(self.prompt[:, :count], past_key_values=cache, logits_to_keep=1)
            finally:
                _detach(cache)

    def measured(self, name: str, config: FadeConfig | None = None) -> Measured:
        """One call of ``generate``."""
        work, ours = self.work, name in (GROWING, *self.fast)
        count = work.warmup + work.steps if name in (STATIC, *self.fast) else work.checked
        kernels = Kernels(count if work.profile else None)
        clock = Clock(self.device, kernels.at)
        kept = Kept(work.checked, work.context)
        how: dict[str, Any] = {"compile_config": self.compiled} if name in COMPILED else {"disable_compile": True}
        if name in (RECORDED, GROWING_RECORDED):
            how["custom_generate"] = self.custom_generate
        cache = self.make(name, config)
        begun = time.perf_counter()
        try:
            self.model.generate(
                self.prompt,
                attention_mask=torch.ones_like(self.prompt),
                past_key_values=cache,
                max_new_tokens=count + PROFILED * work.profile + 1,
                do_sample=False,
                stopping_criteria=[clock],
                logits_processor=[kept, Dictate(self.text, work.context)],
                **how,
            )
            held, implementations = live_bytes(cache), ""
            if name in self.fast:
                plan = cache.tiered[0].steps.step_plan
                implementations = f"{plan.append.name}, {plan.attention.name}"
        finally:
            kernels.stop()
            _detach(cache)
            del cache
            free(self.device)
        took = [1e3 * (after - before) for before, after in itertools.pairwise(clock.times[: count + 1])]
        first = min(work.warmup, len(took) - 1)
        late = took[first:]
        return Measured(
            GenerateTime(
                statistics.median(late),
                statistics.mean(late),
                max(late),
                1e3 * (clock.times[0] - begun),
                sum(took[: work.warmup]),
                held,
                implementations,
                kernels.busy_ms,
                kernels.shares if ours else {},
            ),
            torch.stack([step.cpu() for step in kept.logits]),  # [checked, B, vocabulary]
            clock.graphs[count] - clock.graphs[first],
        )


@dataclass(frozen=True)
class Measured:
    """What one call of ``generate`` told.

    Attributes:
        time: of its steps.
        logits: ``[checked, B, vocabulary]``, on the CPU.
        graphs: compiled while the timed steps ran.
    """

    time: GenerateTime
    logits: Tensor
    graphs: int


def free(device: torch.device) -> None:
    """Let go of what was compiled, recorded and dropped: compiled code would be guarded against in later calls, too."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _detach(cache: Cache) -> None:
    if isinstance(cache, TieredKVCache):
        cache.detach()


def distance(found: Tensor, wanted: Tensor) -> float:
    """Relative distance of logits ``[steps, B, vocabulary]``."""
    gap = scale = 0.0
    for ours, theirs in zip(found, wanted, strict=True):  # step by step: in float32 they are large
        gap += float((ours.float() - theirs.float()).square().sum())
        scale += float(theirs.float().square().sum())
    return float((gap / scale) ** 0.5)
