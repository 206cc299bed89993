"""``fade eval TASK``: measure what a cache costs, in decode. A sub-command for every task that is installed."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from fade_core.cli.console import errors, out, print_json, rows, table, working
from fade_core.cli.options import EXACT, Device, Dtype, Json, Model, TextFiles, named_caches, open_model, read_texts
from fade_core.errors import UnknownComponentError
from fade_core.support.validation import did_you_mean
from fade_eval.cli import quality, sensitivity


class TaskGroup(TyperGroup):
    """The sub-commands that compare many caches, and one for each installed task; tasks are looked up when needed."""

    def list_commands(self, ctx: Any) -> list[str]:
        from fade_eval.tasks import eval_tasks

        own = super().list_commands(ctx)
        return [*(name for name in eval_tasks() if name not in own), *own]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        from fade_core.plugins import default_registry
        from fade_eval.tasks import eval_task

        found = super().get_command(ctx, cmd_name)
        if found is not None:
            return found
        near = did_you_mean(cmd_name, self.commands)
        if near and not default_registry().has("eval_tasks", cmd_name):
            raise UnknownComponentError(f"unknown eval task {cmd_name!r}{near}")
        return _command_of(cmd_name, eval_task(cmd_name).summary)


app = typer.Typer(cls=TaskGroup, help="Measure what a cache costs, in decode, with the bytes that it really held.")
app.command("quality")(quality.quality)
app.command("sensitivity")(sensitivity.sensitivity)


@app.callback(invoke_without_command=True)
def _tasks(context: typer.Context) -> None:
    from fade_eval.tasks import eval_tasks

    if context.invoked_subcommand is None:
        group: Any = context.command
        for name in eval_tasks().keys() & group.commands.keys():
            errors.print(f"[yellow]warning:[/] the plugin's task {name!r} is left out: a command has that name")
        commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
        lines = [(name, (command.help or "").partition("\n")[0]) for name, command in commands.items()]
        out.print(rows(table("fade eval TASK", "task", "what it measures"), lines))


def _command_of(name: str, summary: str) -> Any:
    alone = typer.Typer(add_completion=False)
    alone.command(name, help=summary)(measure)
    return get_command(alone)


def measure(
    context: typer.Context,
    model: Model = "smollm2",
    config: Annotated[
        list[str],
        typer.Option("--config", "-c", help="A preset, exact, or a configuration file; may be given several times."),
    ] = ["safe"],  # noqa: B006 (typer copies it)
    text: TextFiles = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens fed at once before measuring.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded through the cache, a text.")] = 128,
    count: Annotated[int | None, typer.Option(min=1, help="Texts (default 10), or needles (default 20).")] = None,
    steps_per_forward: Annotated[int, typer.Option(min=1, help="More than 1 is faster and close to it.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts decoded side by side (divergence).")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of what is drawn.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """One task over each configuration; the task is what the command is called."""
    from fade_eval.tasks import EvalOptions, eval_task

    task = str(context.info_name)
    chosen = eval_task(task)
    exact = {EXACT: EXACT} if EXACT in config else {}
    caches: dict[str, Any] = exact | named_caches([name for name in config if name != EXACT])
    texts = read_texts(text)
    loaded, tokenizer = open_model(model, dtype, device)
    if count is None and task != "needle":
        count = 10
    found = {}
    for name, cache in caches.items():
        with working(f"{task} {name}") as advance:
            options = EvalOptions(texts, prompt_tokens, steps, count, steps_per_forward, seed, advance, batch_size)
            found[name] = chosen.run(loaded, tokenizer, cache, options).to_dict()
    if json:
        print_json({"task": task, "model": model, "results": found})
        return
    figures = [name for name, value in next(iter(found.values())).items() if not isinstance(value, (list, tuple, dict))]
    made = table(task, "figure", *(f">{name}" for name in found))
    for figure in figures:
        made.add_row(figure.replace("_", " "), *(_shown(result[figure]) for result in found.values()))
    for part in ("cache", "exact", "ratio", "ratio_16bit"):
        if all("held" in result for result in found.values()):
            made.add_row(f"held {part.replace('_', ' ')}", *(_shown(result["held"][part]) for result in found.values()))
    out.print(made)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
