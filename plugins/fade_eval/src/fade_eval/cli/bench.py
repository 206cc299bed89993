"""``fade bench``: what a decode step costs with each cache, measured in turns; and the benchmarks beside it."""

from __future__ import annotations

from typing import Annotated

import typer

from fade_core.cli.console import complain, print_json, rows, show_figures, size, table, working
from fade_core.cli.options import PRESETS, Caches, Device, Dtype, Json, Model, named_caches, open_model
from fade_eval.cli import benchbatch, benchdecode

WINDOW = 64
"""Newest tokens that peers keep in full precision: as many as the presets do."""


def group() -> typer.Typer:
    """``fade bench`` with its sub-commands; plugins add theirs."""
    app = typer.Typer(help="Time decode steps: of presets in turns, or what a sub-command says.")
    app.callback(invoke_without_command=True)(bench)
    app.command("decode")(benchdecode.decode)
    app.command("batch")(benchbatch.batch)
    return app


def bench(
    context: typer.Context,
    model: Model = "smollm2",
    config: Caches = PRESETS,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens in the cache when timing begins.")] = 2048,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each cache.")] = 9,
    steps: Annotated[int, typer.Option(min=1, help="Decode steps a turn.")] = 8,
    peers: Annotated[
        bool,
        typer.Option("--peers", help="Time transformers' QuantizedCache too, with every backend that is installed."),
    ] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Time decode steps of the exact cache and of each configuration, interleaved in one run."""
    if context.invoked_subcommand is not None:
        return
    from fade_core.cache.named_caches import factory_of
    from fade_eval.contenders import peers as all_peers
    from fade_eval.contenders import refusal
    from fade_eval.speed import step_times
    from fade_eval.tokens import token_rows

    caches = named_caches(config)
    loaded, tokenizer = open_model(model, dtype, device)
    (ids,) = token_rows(None, tokenizer, prompt_tokens, loaded.device, limit=1)
    factories = {name: factory_of(cache) for name, cache in caches.items()}
    for peer in all_peers(WINDOW) if peers else ():
        if reason := refusal(peer, loaded, ids[:, :8]):
            complain(f"left out: {peer.name}: {reason}")
        else:
            factories[peer.name] = peer.factory
    with working(f"{len(factories) + 1} caches, {rounds} rounds of {steps} steps") as advance:
        found = step_times(loaded, ids, factories, rounds=rounds, steps=steps, progress=advance)
    if json:
        results = {name: result.to_dict() for name, result in found.items()}
        print_json({"model": model, "prompt_tokens": prompt_tokens, "device": str(loaded.device), "results": results})
        return
    exact = next(iter(found.values()))
    lines = [
        (
            name,
            f"{result.ms:.1f}",
            f"{result.ms_low:.1f}-{result.ms_high:.1f}",
            f"{result.tokens_per_second:.1f}",
            f"{result.ratio:.2f}x",
            size(result.held_bytes),
            f"{result.held_bytes / exact.held_bytes:.3f}x",
        )
        for name, result in found.items()
    ]
    title = f"decode steps after {prompt_tokens} tokens, {model} on {loaded.device} ({loaded.dtype})"
    columns = ("cache", ">ms a step", ">quartiles", ">tokens/s", ">time to exact", ">bytes held", ">bytes to exact")
    show_figures(rows(table(title, *columns), lines))
