"""Quality per byte: many caches on the same texts and needles, in decode, each against one run with the exact cache."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fade_core.cache.named_caches import opened
from fade_core.errors import ConfigError
from fade_core.models.loading import exact_cache
from fade_eval.bits import packed_bits
from fade_eval.contenders import Contender, excuse, refusal
from fade_eval.decode import prefill
from fade_eval.haystack import Needle, NeedleResult, ask, judge, needle_prompts
from fade_eval.kl import ExactRun, Steps, follow, run_exact, summarise, text_batches
from fade_eval.long import LongRun, long_runs
from fade_eval.progress import Progress, Units
from fade_eval.results import EvalResult
from fade_eval.tokens import Texts, check_counts, long_row

NEEDLE_UNITS = 64
"""Steps that one needle counts for in the progress."""
TRIED = 8
"""Tokens that every contender is tried on before the work begins."""


@dataclass(frozen=True)
class QualityRow(EvalResult):
    """What one cache costs and what it keeps; figures as in ``DivergenceResult``.

    Attributes:
        name: of the contender.
        source: "recipe", "configuration" or "peer".
        note: a few words on what it is.
        bits: bits an element takes once packed, metadata counted (``packed_bits``); NaN if nothing is packed.
        bytes_per_token: of all live tensors at the end of a text, divided by its tokens: sinks, window, transforms and
            book-keeping included.
        ratio_16bit: the same, as a share of what 16-bit keys and values of these tokens take.
        kl_long_first: mean KL of the first 256 steps of a long run; ``None`` if there was none.
        kl_long_last: of its last quarter.
        needles: asked; 0 for none.
        needles_kept: answered right through this cache and through the exact one.
        needles_exact: answered right through the exact cache: what the model can do at all.
    """

    name: str
    source: str
    note: str
    bits: float
    bytes_per_token: float
    ratio_16bit: float
    kl_mean: float
    kl_standard_error: float | None
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top1_standard_error: float | None
    perplexity_change: float
    kl_long_first: float | None
    kl_long_last: float | None
    needles: int
    needles_kept: int
    needles_exact: int


@dataclass(frozen=True)
class QualityResult(EvalResult):
    """Every cache, in the order given.

    Attributes:
        rows: one a cache that ran.
        left_out: name and reason of those that cannot run on this model.
        texts: number of texts.
        prompt_tokens: tokens fed at once before the steps.
        steps: teacher-forced steps a text.
        long_steps: those of the long run, of all texts one after the other.
        batch_size: texts decoded side by side; what they share (transforms, tables) is divided among them.
        exact_perplexity: of the texts through the exact cache.
        exact_bytes_per_token: of the exact cache, in the model's dtype.
    """

    rows: tuple[QualityRow, ...]
    left_out: dict[str, str]
    texts: int
    prompt_tokens: int
    steps: int
    long_steps: int
    batch_size: int
    exact_perplexity: float
    exact_bytes_per_token: float


@dataclass
class _Measured:
    """What has been gathered of one contender."""

    steps: list[Steps] = field(default_factory=list)
    bits: float = math.nan
    long: LongRun | None = None
    needles: NeedleResult | None = None


def quality(
    model: Any,
    tokenizer: Any,
    contenders: Sequence[Contender],
    texts: Texts = None,
    *,
    prompt_tokens: int = 1024,
    steps: int = 128,
    max_texts: int | None = None,
    steps_per_forward: int = 1,
    batch_size: int = 1,
    long_steps: int = 0,
    needles: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
) -> QualityResult:
    """Measure caches side by side. The exact cache runs once over every text and needle, for all of them.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        contenders: what to compare; their names must differ.
        texts: one or several, as strings or token ids; ``None`` for the shipped evaluation texts. Needles are hidden in
            them if they are strings.
        prompt_tokens: tokens fed at once before the steps, and of a needle's haystack.
        steps: tokens fed one by one after the prompt, which are what is measured.
        max_texts: take only so many texts.
        steps_per_forward: tokens a forward pass after the prompt; more than 1 is faster and close to it.
        batch_size: texts decoded side by side.
        long_steps: tokens of one long run after the prompt, 32 a forward pass; 0 for none.
        needles: needles to ask; 0 for none.
        seed: of the needles.
        progress: called as steps are done.

    Raises:
        InputError: if a text is too short or a number does not make sense.
        ConfigError: if no contender can run here, or one's own configuration cannot.
    """
    check_counts(prompt_tokens=prompt_tokens, steps=steps, steps_per_forward=steps_per_forward, batch_size=batch_size)
    if needles:
        check_counts(needles=needles)
    batches = text_batches(texts, tokenizer, prompt_tokens + steps + 1, model.device, max_texts, batch_size)
    running, left_out = _able(contenders, model, batches[0])
    rows = sum(len(batch) for batch in batches)
    if long_steps:
        check_counts(long_steps=long_steps)
    long = long_row(texts, tokenizer, prompt_tokens + long_steps, model.device) if long_steps else None
    advance = Units((rows * steps + long_steps + needles * NEEDLE_UNITS) * (len(running) + 1), progress)
    found = {contender.name: _Measured() for contender in running}
    for batch in batches:
        run = run_exact(model, batch, prompt_tokens, steps_per_forward=steps_per_forward, advance=advance)
        for contender in tuple(running):
            try:
                _compare(model, contender, run, found[contender.name], steps_per_forward, advance)
            except Exception as error:  # noqa: BLE001 (excuse raises what may not be left out)
                left_out[contender.name] = excuse(contender, error)
                running.remove(contender)
    _check_some(running, left_out)
    for name, answer in ({} if long is None else long_runs(model, long, running, prompt_tokens, advance)).items():
        found[name].long = answer
        if answer.left_out:
            left_out[name] = answer.left_out
    running = [contender for contender in running if contender.name not in left_out]
    _check_some(running, left_out)
    if needles:
        prompts = needle_prompts(tokenizer, needles, prompt_tokens, seed=seed, haystack=_haystack(texts))
        _ask_all(model, tokenizer, running, found, prompts, advance)
    first = summarise(found[running[0].name].steps, prompt_tokens, steps)
    return QualityResult(
        rows=tuple(_row(contender, found[contender.name], prompt_tokens, steps) for contender in running),
        left_out=left_out,
        texts=rows,
        prompt_tokens=prompt_tokens,
        steps=steps,
        long_steps=long_steps,
        batch_size=batch_size,
        exact_perplexity=first.exact_perplexity,
        exact_bytes_per_token=first.held.exact / (prompt_tokens + steps),
    )


def _able(contenders: Sequence[Contender], model: Any, batch: Tensor) -> tuple[list[Contender], dict[str, str]]:
    """Contenders that run on this model, and why the others do not. Raises ``ConfigError`` if none does."""
    reasons = {contender.name: refusal(contender, model, batch[:, :TRIED]) for contender in contenders}
    running = [contender for contender in contenders if not reasons[contender.name]]
    left_out = {name: reason for name, reason in reasons.items() if reason}
    _check_some(running, left_out)
    return running, left_out


def _check_some(running: Sequence[Contender], left_out: dict[str, str]) -> None:
    if not running:
        raise ConfigError("; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "nothing to compare")


def _compare(
    model: Any, contender: Contender, run: ExactRun, into: _Measured, steps_per_forward: int, advance: Units
) -> None:
    with opened(contender.factory, model) as cache:
        prefill(model, run.ids[:, : run.prompt_tokens], cache)
        into.steps += follow(model, cache, run, steps_per_forward=steps_per_forward, advance=advance)
        if math.isnan(into.bits):
            into.bits = packed_bits(cache, model, len(run.ids))


def _ask_all(
    model: Any,
    tokenizer: Any,
    running: Sequence[Contender],
    found: dict[str, _Measured],
    prompts: Sequence[Needle],
    advance: Units,
) -> None:
    def answers(factory: Any) -> list[Any]:
        told = []
        for prompt in prompts:
            told.append(ask(model, prompt, factory))
            advance(NEEDLE_UNITS)
        return told

    exact = answers(exact_cache)
    for contender in running:
        found[contender.name].needles = judge(
            tokenizer, prompts, answers(contender.factory), exact, model.dtype.itemsize
        )


def _haystack(texts: Texts) -> str | None:
    given = [texts] if isinstance(texts, str) else list(texts if texts is not None else ())
    return "\n\n".join(text for text in given if isinstance(text, str)) or None


def _row(contender: Contender, measured: _Measured, prompt_tokens: int, steps: int) -> QualityRow:
    result, needles = summarise(measured.steps, prompt_tokens, steps), measured.needles
    return QualityRow(
        name=contender.name,
        source=contender.source,
        note=contender.note,
        bits=measured.bits,
        bytes_per_token=result.held.cache / (prompt_tokens + steps),
        ratio_16bit=result.held.ratio_16bit,
        kl_mean=result.kl_mean,
        kl_standard_error=result.kl_standard_error,
        kl_p99=result.kl_p99,
        kl_max=result.kl_max,
        top1_agreement=result.top1_agreement,
        top1_standard_error=result.top1_standard_error,
        perplexity_change=result.perplexity_change,
        kl_long_first=measured.long.first if measured.long else None,
        kl_long_last=measured.long.last if measured.long else None,
        needles=needles.needles if needles else 0,
        needles_kept=needles.kept if needles else 0,
        needles_exact=needles.exact_found if needles else 0,
    )
