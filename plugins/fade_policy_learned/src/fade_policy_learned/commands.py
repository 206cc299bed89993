"""``fade train-policy``: learn from text which tokens a model will go on looking at."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fade_core.errors import InputError
from fade_core.training import Peak, check_folder, pieces_of, read_text, spread, steps
from fade_policy_learned.agreement import rankings
from fade_policy_learned.traces import collect
from fade_policy_learned.training import train_policy


def train_policy_command(
    text: Annotated[list[Path], typer.Option("--text", help="UTF-8 text file; may be given several times.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to write the policy (.safetensors).")],
    model: Annotated[str, typer.Option("--model", "-m", help='Hub id, folder, .gguf file, or "smollm2".')] = "smollm2",
    target: Annotated[
        Literal["movement", "mass"],
        typer.Option(help="Worth of a token: how far later outputs move without it, or the attention it gets."),
    ] = "movement",
    length: Annotated[int, typer.Option(min=32, help="Tokens read at once: as long as contexts will be.")] = 1024,
    max_tokens: Annotated[int, typer.Option(min=128, help="Most tokens to read; spread evenly over the text.")] = 32768,
    cuts: Annotated[int, typer.Option(min=1, help="Places of a piece at which tokens are judged.")] = 3,
    future: Annotated[int, typer.Option(min=1, help="Tokens after each place in whose light they are.")] = 128,
    window: Annotated[int, typer.Option(min=0, help="Recent window that the cache will have.")] = 64,
    hidden: Annotated[int, typer.Option(min=1, help="Width of the network.")] = 32,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the tokens.")] = 4,
    held_out: Annotated[float, typer.Option(help="Share of the pieces to measure on.")] = 0.2,
    seed: Annotated[int, typer.Option(help="Of the split, the sampling, the weights and the order.")] = 0,
    dtype: Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Train an eviction policy on a model's own attention over text (kind = "learned"); measured on text held out."""
    from fade_core import load_model  # brings transformers, which `fade --help` does without

    check_folder(output)
    texts = [read_text(path) for path in text]
    loaded, tokenizer = load_model(model, dtype=dtype, device=device)
    pieces, sources = cut(tokenizer, texts, length, max_tokens)
    memory, started = Peak(loaded.device), time.perf_counter()
    with steps("reading texts", memory) as advance:
        traces = collect(
            loaded,
            pieces,
            cuts=cuts,
            future=future,
            target=target,
            recent_window=window,
            seed=seed,
            progress=advance,
        )
    read = time.perf_counter() - started
    groups = torch.tensor(sources)[traces.texts]  # pieces of one file are not told apart: they resemble one another
    with steps("training", memory) as advance:
        result = train_policy(
            traces.features,
            traces.targets,
            groups=groups if len(set(sources)) > 1 else traces.texts,
            geometry=traces.geometry,
            loss="tweedie",
            hidden=hidden,
            epochs=epochs,
            batch_size=16384,
            learning_rate=5e-3,
            weight_decay=1e-3,
            held_out=held_out,
            seed=seed,
            progress=advance,
        )
    seconds = time.perf_counter() - started
    policy = result.policy
    policy.notes = {
        "model": name_of(model),
        "texts": [path.name for path in text],
        "tokens": sum(map(len, pieces)),
        "options": {
            "target": target,
            "length": length,
            "cuts": cuts,
            "future": future,
            "window": window,
            "hidden": hidden,
            "epochs": epochs,
            "held_out": held_out,
            "seed": seed,
        },
        "held_out_r2": round(result.held_out_r2, 4),
        "held_out_rank_correlation": round(result.held_out_rank_correlation, 4),
    }
    policy.save(output)
    console = Console()
    table = Table(title=f"{result.held_out_tokens:,} tokens of held-out text, ranked within each head")
    for column in ("ranked by", "of the true top half", "worth in half", "worth in a quarter"):
        table.add_column(column, justify="left" if column == "ranked by" else "right")
    for name, found in rankings(policy, traces, result.held_out).items():
        table.add_row(name, *(f"{x:.3f}" for x in (found.overlap_half, found.worth_half, found.worth_quarter)))
    console.print(table)
    console.print(
        f"{output}: {output.stat().st_size / 1e3:.0f} kB for {policy.geometry}, from {policy.notes['tokens']:,} tokens "
        f"({result.train_tokens:,} traces) in {seconds:.0f} s ({read:.0f} s of reading), peak memory "
        f"{memory.peak / 1e9:.2f} GB (model included). Held out: R2 {result.held_out_r2:.3f}, rank correlation "
        f"{result.held_out_rank_correlation:.3f}. Use it with\n"
        f'  policy = {{ kind = "learned", checkpoint = "{output}", budget = 0.5 }}',
        soft_wrap=True,
        markup=False,
        highlight=False,
    )


def cut(tokenizer: Any, texts: list[str], length: int, max_tokens: int) -> tuple[list[Tensor], list[int]]:
    """Pieces of ``length`` token ids, evenly spread over ``texts``, at most ``max_tokens`` in all, and the text of each.

    Each piece begins with the tokenizer's beginning-of-sequence token if it has one, as a prompt would.

    Raises:
        InputError: if there are not two pieces, one to train on and one to measure on.
    """
    found = pieces_of(tokenizer, texts, length)
    if len(found) < 2:
        raise InputError(
            f"the texts fill {len(found)} pieces of {length} tokens; two are needed, one to train on and one to measure "
            f"on, and 10 or more are better. Give more or longer texts, or a smaller --length"
        )
    kept = spread(found, max(2, max_tokens // length))
    return [ids for ids, _ in kept], [number for _, number in kept]


def name_of(model: str) -> str:
    """A name as it is, a path's last part: where a model lies on this machine is nobody's business."""
    return Path(model).name if Path(model).exists() else model
