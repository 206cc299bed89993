"""The public-domain texts that come with FADE: a document for the demo, passages to evaluate on and to calibrate on.

Where each comes from is written in ``data/texts/SOURCES.md``.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal, get_args

from fade_core.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.resources.abc import Traversable

Split = Literal["evaluation", "calibration", "unlike"]
Kind = Literal["novel", "encyclopedia", "law", "drama", "verse"]


@dataclass(frozen=True)
class Passage:
    """One piece of text.

    Attributes:
        name: "<work>-<part>", unique in its split.
        kind: what sort of text it is.
        author: who wrote it.
        title: the work it was taken from.
        year: when that was published.
        text: the passage, paragraphs separated by blank lines.
    """

    name: str
    kind: Kind
    author: str
    title: str
    year: int
    text: str


@dataclass(frozen=True)
class Question:
    """A question about the demo document, and words that a right answer holds."""

    text: str
    expected: tuple[str, ...]

    def answered_by(self, answer: str) -> bool:
        """Whether ``answer`` holds every expected word (case ignored)."""
        return all(word.lower() in answer.lower() for word in self.expected)


@dataclass(frozen=True)
class DemoDocument:
    """A long document (3,400 SmolLM2 tokens) and questions about its beginning, middle and end."""

    passage: Passage
    questions: tuple[Question, ...]

    def prompt(self, question: Question) -> str:
        """The user's message: the document first, so that all questions share it as a prefix."""
        return f"{self.passage.text}\n\nAnswer the question about the text above in one short sentence. {question.text}"


def passages(split: Split, kind: Kind | None = None) -> tuple[Passage, ...]:
    """The passages of one split; kinds and works alternate, so that the first few are a fair sample.

    ``evaluation``: 24 of at least 1,500 SmolLM2 tokens, novels and encyclopedia articles; tune nothing on them.
    ``calibration``: 14 of at least 1,050 tokens, from other works or other parts of them.
    ``unlike``: 4 of at least 1,450 tokens, drama and verse.

    Args:
        split: which set.
        kind: only passages of this kind.

    Raises:
        InputError: an unknown split, or a kind of which the split holds nothing.
    """
    if split not in get_args(Split):
        raise InputError(f"no split of texts is called {split!r}; there are {', '.join(get_args(Split))}")
    everything = _load(split)
    kinds = sorted({p.kind for p in everything})
    if kind is None:
        return _alternate([_alternate_works(everything, each) for each in kinds])
    if kind not in kinds:
        raise InputError(f"the split {split!r} holds no passage of kind {kind!r}; it holds {', '.join(kinds)}")
    return _alternate_works(everything, kind)


def demo_document() -> DemoDocument:
    """The document of ``fade demo``. SmolLM2-135M-Instruct answers all its questions with an exact cache."""
    (passage,) = _load("demo")
    return DemoDocument(
        passage,
        (
            Question("Who was fast asleep at the table?", ("Dormouse",)),
            Question(
                "What were the names of the three little sisters who lived in the well?", ("Elsie", "Lacie", "Tillie")
            ),
            Question("What did the Hatter and the March Hare try to put into the teapot?", ("Dormouse",)),
        ),
    )


def _alternate_works(everything: Sequence[Passage], kind: Kind) -> tuple[Passage, ...]:
    works: dict[str, list[Passage]] = {}
    for passage in everything:
        if passage.kind == kind:
            works.setdefault(passage.title, []).append(passage)
    return _alternate(list(works.values()))


def _alternate(groups: Sequence[Sequence[Passage]]) -> tuple[Passage, ...]:
    return tuple(p for turn in zip_longest(*groups) for p in turn if p is not None)


@cache
def _load(prefix: str) -> tuple[Passage, ...]:
    folder = files("fade_eval").joinpath("data", "texts")
    works = tomllib.loads(folder.joinpath("works.toml").read_text("utf-8"))
    names = sorted(f.name for f in folder.iterdir() if f.name.startswith(f"{prefix}-") and f.name.endswith(".txt"))
    return tuple(_read(folder, name, works) for name in names)


def _read(folder: Traversable, filename: str, works: dict[str, dict[str, object]]) -> Passage:
    _, work, part = filename.removesuffix(".txt").split("-")
    text = folder.joinpath(filename).read_text("utf-8").strip()
    return Passage(name=f"{work}-{part}", text=text, **works[work])  # type: ignore[arg-type]
