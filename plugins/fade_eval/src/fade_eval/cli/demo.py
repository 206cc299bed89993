"""``fade demo``: a real model over a long document, with the exact cache and with each configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fade_core.cli.console import Advance, errors, out, rows, say, size, table, working
from fade_core.cli.generate import run_generate
from fade_core.cli.options import EXACT, PRESETS, Caches, Device, Dtype, Model, named_caches, open_model
from fade_core.errors import FadeError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from fade_core.cache.named_caches import CacheFactory
    from fade_eval.cli.picture import TierPicture
    from fade_eval.kl import ExactRun

CHECKED = 256
"""Steps compared with the exact cache: its own answer, then a text that follows."""
STEPS_PER_FORWARD = 8
TIMED = 24
"""Single-token steps that the speed is measured on, after everything else."""


@dataclass(frozen=True)
class Shown:
    """One line of the table.

    Attributes:
        held: bytes of the cache after the answer.
        peak: highest tensor bytes above the weights while the prompt is read, cache and activations.
        tokens_per_second: of single-token steps after the prompt, from the median step.
        answer: text.
        kl: mean KL to the exact cache, nats.
        top1: share of steps with the same most likely token.
    """

    held: int
    peak: int
    tokens_per_second: float
    answer: str
    kl: float
    top1: float


def demo(
    model: Model = "smollm2",
    config: Caches = PRESETS,
    output_dir: Annotated[Path, typer.Option(help="Where the picture and the figures go.")] = Path("fade-demo"),
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 40,
    prompt_tokens: Annotated[int | None, typer.Option(min=64, help="Cut the document to fit this prompt.")] = None,
    question: Annotated[str | None, typer.Option(help="Ask this about the document instead.")] = None,
    document: Annotated[Path | None, typer.Option(help="A text file to ask about; needs --question.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
) -> None:
    """Answer a question about a long document with the exact cache and with each preset, and compare.

    Prints for each cache the bytes it really held, the peak, the speed, how far its next-token distributions are from
    those of the exact cache, and its answer; draws which tokens live in which tier.
    """
    from fade_core.cache.named_caches import tiered_factory
    from fade_core.cli.prompts import document_ids
    from fade_eval.cli.picture import draw

    text, asked = _subject(document, question)
    caches = named_caches(config)
    output_dir.mkdir(parents=True, exist_ok=True)
    loaded, tokenizer = open_model(model, dtype, device)
    ids = document_ids(tokenizer, text, asked, _limit(loaded, prompt_tokens, max_new_tokens)).to(loaded.device)
    errors.print(f"{ids.shape[1]} prompt tokens; question: {asked}", markup=False)
    runner = _Runner(loaded, tokenizer, ids, max_new_tokens)
    results, pictures = {}, {}
    with working("exact cache") as advance:
        results[EXACT], run = runner.exact(advance)
    for name, cache in caches.items():
        with working(f"{name} cache") as advance:
            results[name], pictures[name] = runner.compressed(tiered_factory(cache), run, advance)  # type: ignore[arg-type]
    if pictures:
        draw(pictures, output_dir / "tiers.png")
    _print(results, loaded, ids.shape[1])
    _save(results, pictures, output_dir / "demo.json", model, ids.shape[1])
    say(f"picture: {output_dir / 'tiers.png'}   figures: {output_dir / 'demo.json'}")


@dataclass(frozen=True)
class _Answer:
    """What ``generate()`` gave: token ids, text, bytes held, peak while the prompt was read, and the picture."""

    tokens: list[int]
    text: str
    held: int
    peak: int
    picture: TierPicture | None

    def shown(self, rate: float, kl: float, top1: float) -> Shown:
        return Shown(self.held, self.peak, rate, self.text, kl, top1)


class _Runner:
    """Runs every cache over the same prompt and, from there, over the same tokens."""

    def __init__(self, model: Any, tokenizer: Any, ids: Tensor, max_new_tokens: int) -> None:
        self.model, self.tokenizer, self.ids, self.max_new_tokens = model, tokenizer, ids, max_new_tokens

    def exact(self, advance: Advance) -> tuple[Shown, ExactRun]:
        """The exact cache's line, and its run over its own answer and a text that follows."""
        import torch

        from fade_core.cache.named_caches import opened
        from fade_core.models.loading import exact_cache
        from fade_eval.kl import follow_exact, run_exact
        from fade_eval.speed import decode_rate
        from fade_eval.tokens import token_rows

        prompt = self.ids.shape[1]
        with opened(exact_cache, self.model) as cache:
            answer = self._answer(cache)
            tokens = torch.tensor([answer.tokens], device=self.ids.device)
            (follows,) = token_rows(None, self.tokenizer, CHECKED, self.ids.device, limit=1)
            row = torch.cat([self.ids, tokens, follows], dim=1)[:, : prompt + CHECKED + 1]
            options: dict[str, Any] = {"steps_per_forward": STEPS_PER_FORWARD, "advance": _counting(advance)}
            rewound = self._rewound(cache)
            run = follow_exact(self.model, cache, row, prompt, **options) if rewound else None
            rate = decode_rate(self.model, cache, TIMED)
        return answer.shown(rate, 0.0, 1.0), run or run_exact(self.model, row, prompt, **options)

    def compressed(self, factory: CacheFactory, run: ExactRun, advance: Advance) -> tuple[Shown, TierPicture]:
        """A compressed cache's line and picture."""
        from fade_core.cache.named_caches import opened
        from fade_eval.kl import compare, follow
        from fade_eval.speed import decode_rate

        options: dict[str, Any] = {"steps_per_forward": STEPS_PER_FORWARD, "advance": _counting(advance)}
        with opened(factory, self.model) as cache:
            answer = self._answer(cache)
            steps = follow(self.model, cache, run, **options) if self._rewound(cache) else None
            rate = decode_rate(self.model, cache, TIMED)
        (found,) = steps or compare(self.model, factory, run, **options)
        if answer.picture is None:
            raise InputError("this cache cannot say which tier a token lives in")
        return answer.shown(rate, float(found.kl.mean()), float(found.same.double().mean())), answer.picture

    def _answer(self, cache: Any) -> _Answer:
        from fade_core.cli.streaming import TokenWatch
        from fade_core.support.memory import PeakTracker, live_bytes
        from fade_eval.cli.picture import TierPicture

        peak = PeakTracker(self.model.device)
        watch = TokenWatch(on_first=peak.stop)  # tracking slows every operation; the answer is timed
        with peak:
            tokens = run_generate(self.model, self.tokenizer, self.ids, cache, self.max_new_tokens, watch)
        return _Answer(
            tokens,
            str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip(),
            live_bytes(cache, exclude=self.model),
            peak.peak,
            TierPicture.of(cache) if hasattr(cache, "tier_names") else None,
        )

    def _rewound(self, cache: Any) -> bool:
        """Forget the answer, so that the prompt need not be read again; false if a layer of this model cannot."""
        try:
            cache.crop(self.ids.shape[1] - cache.get_seq_length())
        except (RuntimeError, ValueError, NotImplementedError, FadeError):
            return False
        return bool(cache.get_seq_length() == self.ids.shape[1])


def _counting(advance: Advance) -> Callable[[int], None]:
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done += count
        advance(done, CHECKED)

    return add


def _subject(document: Path | None, question: str | None) -> tuple[str, str]:
    """The document and the question."""
    from fade_eval.texts import demo_document

    if document is None:
        shipped = demo_document()
        return shipped.passage.text, question or shipped.questions[0].text
    if question is None:
        raise InputError("--document needs a --question about it")
    try:
        return document.read_text(encoding="utf-8"), question
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"document {document} cannot be read: {error}") from error


def _limit(model: Any, prompt_tokens: int | None, max_new_tokens: int) -> int | None:
    """Most prompt tokens that fit the model's context beside the answer and the steps that are compared."""
    from fade_core.models.loading import context_length

    context = context_length(model)
    if context is None:
        return prompt_tokens
    room = context - max(max_new_tokens, CHECKED + TIMED + 1)
    if prompt_tokens is not None and prompt_tokens > room:
        raise InputError(
            f"--prompt-tokens {prompt_tokens} does not fit: the model takes {context}, {room} for the prompt"
        )
    return prompt_tokens or room


def _print(results: dict[str, Shown], model: Any, prompt_tokens: int) -> None:
    exact = results[EXACT]
    sixteen = exact.held * 2 / model.dtype.itemsize
    lines = [
        (
            name,
            size(line.held),
            f"{line.held / exact.held:.3f}x",
            f"{line.held / sixteen:.3f}x",
            size(line.peak),
            f"{line.tokens_per_second:.1f}",
            "-" if name == EXACT else f"{line.top1:.1%}",
            "-" if name == EXACT else f"{line.kl:.5f}",
            line.answer,
        )
        for name, line in results.items()
    ]
    title = f"{prompt_tokens} prompt tokens, {model.dtype} on {model.device}; KL and top-1 over {CHECKED} steps"
    columns = (
        *("cache", ">bytes held", ">to exact", ">to 16 bits", ">peak reading"),
        *(">tokens/s", ">top-1", ">KL", "answer"),
    )
    out.print(rows(table(title, *columns), lines))


def _save(
    results: dict[str, Shown], pictures: dict[str, TierPicture], path: Path, model: str, prompt_tokens: int
) -> None:
    figures = {
        name: {**vars(line), "tiers": pictures[name].shares() if name in pictures else {}}
        for name, line in results.items()
    }
    path.write_text(
        json.dumps({"model": model, "prompt_tokens": prompt_tokens, "caches": figures}, indent=2) + "\n",
        encoding="utf-8",
    )
