"""``fade eval``: measure what a cache costs, in decode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fade_core.cli.console import out, print_json, rows, table, working
from fade_core.cli.options import EXACT, Device, Dtype, Json, Model, named_caches, open_model
from fade_core.errors import InputError


def evaluate(
    task: Annotated[str | None, typer.Argument(help="divergence, perplexity, needle, or a plugin's task.")] = None,
    model: Model = "smollm2",
    config: Annotated[
        list[str],
        typer.Option("--config", "-c", help="A preset, exact, or a configuration file; may be given several times."),
    ] = ["safe"],  # noqa: B006 (typer copies it)
    text: Annotated[list[Path] | None, typer.Option(help="Text files; default: the texts that FADE ships.")] = None,
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
    """Measure a cache token by token, with the bytes it really held. Without a task: list the tasks."""
    from fade_core.eval.tasks import EvalOptions, eval_task, eval_tasks

    if task is None:
        out.print(rows(table("tasks", "name", "what it measures"), [(n, t.summary) for n, t in eval_tasks().items()]))
        return
    chosen = eval_task(task)
    exact = {EXACT: EXACT} if EXACT in config else {}
    caches: dict[str, Any] = exact | named_caches([name for name in config if name != EXACT])
    texts = [_read(path) for path in text] if text else None
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


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path} cannot be read: {error}") from error


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
