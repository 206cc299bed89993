"""A needle in a haystack: a number hidden in a long text, asked for through the compressed cache."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fade_core.cache.named_caches import CacheFactory, CacheLike, factory_of, opened
from fade_core.errors import InputError
from fade_core.models.loading import exact_cache
from fade_core.support.memory import live_bytes
from fade_eval.decode import feed, greedy, prefill
from fade_eval.progress import Progress, Units
from fade_eval.results import EvalResult, HeldBytes, mean
from fade_eval.tokens import check_counts, encode, evaluation_texts

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_CITIES = (
    *("Paris", "Tokyo", "Cairo", "Lima", "Oslo", "Madrid", "Delhi", "Berlin", "Sydney", "Toronto"),
    *("Athens", "Dublin", "Vienna", "Warsaw", "Lisbon", "Nairobi", "Boston", "Havana", "Seoul", "Rome"),
)


@dataclass(frozen=True)
class Needle:
    """One prompt: the number that was hidden, where, and its tokens.

    Attributes:
        city: what the number belongs to.
        number: the answer.
        depth: share of the haystack before the needle.
        context: int64 ``[1, C]``, haystack and needle, fed at once.
        question: int64 ``[1, Q]``, fed through the cache afterwards.
        answer: the answer's token ids.
    """

    city: str
    number: str
    depth: float
    context: Tensor
    question: Tensor
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Answer:
    """Token ids that one cache answered with, and the bytes that it held after them."""

    tokens: list[int]
    bytes_held: int


@dataclass(frozen=True)
class NeedleAnswer(EvalResult):
    """What came back for one needle, through the cache and through the exact one."""

    city: str
    expected: str
    depth: float
    answer: str
    exact_answer: str
    found: bool
    exact_found: bool


@dataclass(frozen=True)
class NeedleResult(EvalResult):
    """Needles found by exact match of the whole number, decoded greedily.

    Attributes:
        needles: prompts asked.
        found: answered right through the cache.
        exact_found: answered right through transformers' own cache: what the model can do at all.
        kept: answered right through both: ``kept / exact_found`` is what compression left.
        context_tokens: tokens of haystack and needle.
        held: what the caches held after the answer.
        answers: every prompt.
    """

    needles: int
    found: int
    exact_found: int
    kept: int
    context_tokens: int
    held: HeldBytes
    answers: tuple[NeedleAnswer, ...]


def needle(
    model: Any,
    tokenizer: Any,
    config: CacheLike = None,
    *,
    cache_factory: CacheFactory | None = None,
    needles: int = 20,
    context_tokens: int = 1024,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    haystack: str | None = None,
    progress: Progress | None = None,
) -> NeedleResult:
    """Hide numbers at several depths of a text and ask for them after the text has been compressed.

    The haystack goes in at once; the question and the answer are decoded through the cache.

    Args:
        model: a causal language model in evaluation mode.
        tokenizer: its tokenizer.
        config: a configuration, a preset's name, a configuration file or a factory; ``None`` for the default.
        cache_factory: makes the cache to measure, instead of ``config``.
        needles: prompts to ask, depths taken in turn.
        context_tokens: tokens of haystack and needle together.
        depths: shares of the haystack before the needle, 0 to 1.
        seed: of the numbers and the haystacks.
        haystack: text to hide in; ``None`` for the shipped evaluation texts.
        progress: called as needles are done.

    Raises:
        InputError: if a number does not make sense or the needle does not fit.
        ConfigError: if ``config`` means no cache.
    """
    factory = cache_factory if cache_factory is not None else factory_of(config)
    prompts = needle_prompts(tokenizer, needles, context_tokens, depths, seed, haystack)
    advance = Units(len(prompts), progress)
    found, exact = [], []
    for prompt in prompts:
        found.append(ask(model, prompt, factory))
        exact.append(ask(model, prompt, exact_cache))
        advance(1)
    return judge(tokenizer, prompts, found, exact, model.dtype.itemsize)


def judge(
    tokenizer: Any, prompts: Sequence[Needle], found: Sequence[Answer], exact: Sequence[Answer], itemsize: int
) -> NeedleResult:
    """Answers through a cache beside those through the exact one, prompt by prompt.

    Args:
        tokenizer: of the model that answered.
        prompts: what was asked.
        found: answers through the cache.
        exact: answers through transformers' own cache.
        itemsize: bytes of a number in the exact cache.
    """
    answers = tuple(
        NeedleAnswer(
            city=prompt.city,
            expected=prompt.number,
            depth=prompt.depth,
            answer=tokenizer.decode(mine.tokens).strip(),
            exact_answer=tokenizer.decode(theirs.tokens).strip(),
            found=tuple(mine.tokens) == prompt.answer,
            exact_found=tuple(theirs.tokens) == prompt.answer,
        )
        for prompt, mine, theirs in zip(prompts, found, exact, strict=True)
    )
    held, exact_held = (mean([answer.bytes_held for answer in side]) for side in (found, exact))
    return NeedleResult(
        needles=len(answers),
        found=sum(answer.found for answer in answers),
        exact_found=sum(answer.exact_found for answer in answers),
        kept=sum(answer.found and answer.exact_found for answer in answers),
        context_tokens=prompts[0].context.shape[1],
        held=HeldBytes.of(held, exact_held, itemsize),
        answers=answers,
    )


def needle_prompts(
    tokenizer: Any,
    needles: int = 20,
    context_tokens: int = 1024,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
    haystack: str | None = None,
) -> list[Needle]:
    """The prompts that ``needle`` asks; arguments and errors as there."""
    check_counts(needles=needles, context_tokens=context_tokens)
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise InputError(f"depths must be numbers from 0 to 1, at least one; found {tuple(depths)}")
    draw = random.Random(seed)
    straw = [encode(text, tokenizer, special=False) for text in ([haystack] if haystack else evaluation_texts())]
    start = encode("", tokenizer)  # what the tokenizer puts before a text, if anything
    prompts = []
    for turn in range(needles):
        city, number = _CITIES[turn % len(_CITIES)], str(draw.randint(10000, 99999))
        hidden = encode(f" The special magic number for {city} is {number}. ", tokenizer, special=False)
        room = context_tokens - hidden.numel() - start.numel()
        if room < 1:
            raise InputError(f"context_tokens={context_tokens} has no room for a needle of {hidden.numel()} tokens")
        draw.shuffle(straw)
        filler = torch.cat(straw)
        filler = filler.repeat(-(-room // filler.numel()))[:room]
        depth = depths[turn % len(depths)]
        cut = int(room * depth)
        question = f"\n\nQuestion: What is the special magic number for {city}?\nAnswer: "
        question += f"The special magic number for {city} is"
        prompts.append(
            Needle(
                city,
                number,
                depth,
                torch.cat([start, filler[:cut], hidden, filler[cut:]])[None],
                encode(question, tokenizer, special=False)[None],
                tuple(encode(f" {number}", tokenizer, special=False).tolist()),
            )
        )
    return prompts


def ask(model: Any, prompt: Needle, factory: CacheFactory) -> Answer:
    """Read the haystack at once, then the question token by token, and decode the answer greedily."""
    with opened(factory, model) as cache:
        prefill(model, prompt.context.to(model.device), cache)
        *_, last = feed(model, prompt.question.to(model.device), cache)
        tokens = greedy(model, last[0, -1], cache, len(prompt.answer))
        return Answer(tokens, live_bytes(cache, exclude=model))
