"""The page on measuring, and what is measured."""

from __future__ import annotations

import re
from pathlib import Path

from pages import DOCS, blocks, first_column

from fade_core import FadeConfig
from fade_core.builtin.quantizers.uniform import UniformConfig
from fade_core.plugins import Registry
from fade_eval import plugin
from fade_eval.quality import QualityRow

PAGE = (DOCS / "evaluation.md").read_text()


def test_the_override_in_the_page_on_measuring_is_what_the_command_would_print(tmp_path: Path) -> None:
    (text,) = blocks(PAGE, "toml")
    path = tmp_path / "fade.toml"
    path.write_text(text)
    override = FadeConfig.from_file(path).layers["2"]
    assert (override.keys, override.values) == (
        UniformConfig(bits=8, axis="channel"),
        UniformConfig(bits=8, axis="token"),
    )


def test_every_task_and_command_of_eval_is_documented() -> None:
    tasks = [*Registry([plugin], entry_points=False).names("eval_tasks"), "quality", "sensitivity"]
    assert sorted(first_column(PAGE, "task")) == sorted(tasks)


def test_every_figure_of_quality_is_documented() -> None:
    figures = {name for name in QualityRow.__dataclass_fields__ if name not in ("name", "source", "note")}
    table = re.search(r"^\| column \|.*?\n\n", PAGE, re.DOTALL | re.MULTILINE)
    assert table is not None
    assert figures <= set(re.findall(r"`(\w+)`", table.group()))
