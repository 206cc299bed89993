"""What this distribution registers with FADE. Imports inside the hooks keep start-up light."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fade_core import hookimpl

if TYPE_CHECKING:
    import typer

    from fade_core.interfaces import Recipe
    from fade_eval.tasks import EvalTask


@hookimpl
def fade_eval_tasks() -> Sequence[type[EvalTask]]:
    from fade_eval.tasks import DivergenceTask, NeedleTask, PerplexityTask

    return [DivergenceTask, PerplexityTask, NeedleTask]


@hookimpl
def fade_quality_recipes() -> Sequence[Recipe]:
    from fade_eval.recipes import RECIPES

    return RECIPES


@hookimpl
def fade_commands(app: typer.Typer) -> None:
    from fade_eval.cli import bench, demo, evaluate

    app.command("demo")(demo.demo)
    app.add_typer(evaluate.app, name="eval")
    app.add_typer(bench.group(), name="bench")
