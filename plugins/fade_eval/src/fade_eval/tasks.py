"""Evaluation tasks by name: what ``fade eval NAME`` runs, built in or from a plugin's ``fade_eval_tasks`` hook."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from fade_core.cache.named_caches import CacheLike
from fade_core.errors import InputError, PluginError
from fade_core.plugins import default_registry
from fade_eval.haystack import needle
from fade_eval.kl import divergence
from fade_eval.likelihood import perplexity
from fade_eval.progress import Progress
from fade_eval.results import EvalResult
from fade_eval.tokens import Texts


@dataclass(frozen=True)
class EvalOptions:
    """What the command line passes to every task; a task reads what concerns it.

    Attributes:
        texts: texts to measure on; ``None`` for the shipped ones.
        prompt_tokens: tokens fed at once.
        steps: tokens decoded after it.
        count: texts or prompts to take; ``None`` for the task's own number.
        steps_per_forward: tokens a forward pass after the prompt.
        seed: of whatever is drawn.
        progress: called as work is done.
        batch_size: texts decoded side by side, where the task can.
    """

    texts: Texts = None
    prompt_tokens: int = 1024
    steps: int = 128
    count: int | None = None
    steps_per_forward: int = 1
    seed: int = 0
    progress: Progress | None = None
    batch_size: int = 1


class EvalTask(ABC):
    """One way to measure a cache. A plugin returns subclasses (or objects) from ``fade_eval_tasks``.

    Attributes:
        name: the name it is chosen by.
        summary: one line for ``fade eval --help``.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""

    @abstractmethod
    def run(self, model: Any, tokenizer: Any, cache: CacheLike, options: EvalOptions) -> EvalResult:
        """Measure ``cache`` on a model; the result's ``to_dict`` must be what JSON can hold."""


class DivergenceTask(EvalTask):
    """``fade_eval.kl`` as a task."""

    name: ClassVar[str] = "divergence"
    summary: ClassVar[str] = "KL and top-1 agreement with the exact cache, token by token"

    def run(self, model: Any, tokenizer: Any, cache: CacheLike, options: EvalOptions) -> EvalResult:
        return divergence(
            model,
            options.texts,
            cache,
            tokenizer=tokenizer,
            prompt_tokens=options.prompt_tokens,
            steps=options.steps,
            max_texts=options.count,
            steps_per_forward=options.steps_per_forward,
            batch_size=options.batch_size,
            progress=options.progress,
        )


class PerplexityTask(EvalTask):
    """``fade_core.eval.perplexity`` as a task."""

    name: ClassVar[str] = "perplexity"
    summary: ClassVar[str] = "perplexity of texts decoded through the cache"

    def run(self, model: Any, tokenizer: Any, cache: CacheLike, options: EvalOptions) -> EvalResult:
        return perplexity(
            model,
            options.texts,
            cache,
            tokenizer=tokenizer,
            prompt_tokens=options.prompt_tokens,
            steps=options.steps,
            max_texts=options.count,
            steps_per_forward=options.steps_per_forward,
            progress=options.progress,
        )


class NeedleTask(EvalTask):
    """``fade_core.eval.needle`` as a task."""

    name: ClassVar[str] = "needle"
    summary: ClassVar[str] = "numbers hidden in a long text, found again through the cache"

    def run(self, model: Any, tokenizer: Any, cache: CacheLike, options: EvalOptions) -> EvalResult:
        given = [options.texts] if isinstance(options.texts, str) else list(options.texts or ())
        if not all(isinstance(text, str) for text in given):
            raise InputError("needles are hidden in strings; token ids were given as texts")
        return needle(
            model,
            tokenizer,
            cache,
            needles=options.count or 20,
            context_tokens=options.prompt_tokens,
            seed=options.seed,
            haystack="\n\n".join(str(text) for text in given) or None,
            progress=options.progress,
        )


def eval_task(name: str) -> EvalTask:
    """The task called ``name``.

    Raises:
        UnknownComponentError: if nothing installed provides it.
        PluginError: if two plugins do, or what the plugin gave is no task.
    """
    return _task(name, default_registry().get("eval_tasks", name))


def eval_tasks() -> dict[str, EvalTask]:
    """Every installed task by name. Raises ``PluginError`` if what a plugin gave is no task."""
    return {name: _task(name, task) for name, task in default_registry().all("eval_tasks").items()}


def _task(name: str, found: Any) -> EvalTask:
    task = found() if isinstance(found, type) else found
    if not isinstance(task, EvalTask):
        raise PluginError(f"eval task {name!r} must be an EvalTask; its plugin gave {found!r}")
    return task
