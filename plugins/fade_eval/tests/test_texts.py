from __future__ import annotations

import re
from importlib.resources import files
from itertools import pairwise
from typing import get_args

import pytest

from fade_core.errors import InputError
from fade_eval.texts import Passage, Question, Split, demo_document, passages

FOLDER = files("fade_eval").joinpath("data", "texts")


def everything() -> list[Passage]:
    return [p for split in get_args(Split) for p in passages(split)] + [demo_document().passage]


@pytest.mark.parametrize(
    ("split", "count", "characters"), [("evaluation", 24, 5_900), ("calibration", 14, 4_200), ("unlike", 4, 5_000)]
)
def test_splits_hold_enough(split: Split, count: int, characters: int) -> None:
    found = passages(split)
    assert len(found) == count
    assert min(len(p.text) for p in found) >= characters


def test_evaluation_alternates_between_two_kinds() -> None:
    kinds = [p.kind for p in passages("evaluation")]
    assert kinds.count("novel") == kinds.count("encyclopedia") == 12
    assert len({p.title for p in passages("evaluation")[:8]}) >= 6
    assert all(a != b for a, b in pairwise(kinds))


def test_every_file_is_a_passage_and_every_source_is_written_down() -> None:
    stored = {f.name for f in FOLDER.iterdir() if f.name.endswith(".txt")}
    assert len(stored) == len(everything())
    sources = FOLDER.joinpath("SOURCES.md").read_text("utf-8")
    for passage in everything():
        assert passage.title.split(" (")[0].split(",")[0] in sources
        assert str(passage.year) in sources
        assert passage.author in sources
        assert passage.year < 1929 or "United States" in passage.author


def test_splits_share_no_text() -> None:
    seen: dict[str, str] = {}
    for split in get_args(Split):
        for passage in passages(split):
            words = re.findall(r"\w+", passage.text.lower())
            for start in range(len(words) - 20):
                window = " ".join(words[start : start + 20])
                owner = seen.setdefault(window, split)
                assert owner == split, f"{owner} and {split} ({passage.name}) share {window!r}"


def test_one_kind_only() -> None:
    assert {p.kind for p in passages("calibration", "law")} == {"law"}
    with pytest.raises(InputError, match="holds no passage of kind 'verse'; it holds encyclopedia, novel"):
        passages("evaluation", "verse")


def test_unknown_split_is_refused() -> None:
    with pytest.raises(InputError, match=r"'test'.*evaluation, calibration, unlike"):
        passages("test")  # type: ignore[arg-type]


def test_demo_answers_stand_in_the_document() -> None:
    demo = demo_document()
    assert len(demo.questions) == 3
    for question in demo.questions:
        assert question.answered_by(demo.passage.text)
        assert demo.prompt(question).startswith(demo.passage.text)
        assert demo.prompt(question).endswith(question.text)


def test_an_answer_needs_every_expected_word() -> None:
    question = Question("Who?", ("Elsie", "Tillie"))
    assert question.answered_by("elsie and TILLIE.")
    assert not question.answered_by("Elsie alone")
