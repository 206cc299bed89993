"""``fade eval quality``: every installed format on the same texts, as a table, a CSV file and a Pareto plot."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from fade_core.cli.console import complain, print_json, rows, say, show_figures, table, working
from fade_core.cli.options import Device, Dtype, Json, Model, TextFiles, named_caches, open_model, read_texts
from fade_core.errors import InputError

if TYPE_CHECKING:
    from fade_eval.quality import QualityResult, QualityRow


def quality(
    model: Model = "smollm2",
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", help="A preset or a configuration file to compare too; may be repeated."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="Recipes whose name contains this; may be repeated. Default: all.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="File of fade calibrate: adds the calibrated recipes.")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Where quality.csv and quality.png go.")] = Path("fade-quality"),
    text: TextFiles = None,
    split: Annotated[
        Literal["evaluation", "unlike", "calibration"], typer.Option(help="Which of the shipped texts.")
    ] = "evaluation",
    texts: Annotated[int, typer.Option(min=1, help="Texts to take.")] = 20,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens fed at once before measuring.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded through the cache, a text.")] = 128,
    steps_per_forward: Annotated[int, typer.Option(min=1, help="More than 1 is faster and close to it.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts decoded side by side: faster.")] = 1,
    long_steps: Annotated[
        int, typer.Option(min=0, help="Tokens of one long run, whose last quarter is told; 0 for none.")
    ] = 2048,
    needles: Annotated[int, typer.Option(min=0, help="Needles to ask for; 0 for none.")] = 12,
    sinks: Annotated[int, typer.Option(min=0, help="Sink tokens of the recipes.")] = 4,
    window: Annotated[int, typer.Option(min=0, help="Window of the recipes, residual of the peers.")] = 64,
    seed: Annotated[int, typer.Option(help="Seed of the needles.")] = 0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """What every installed format costs and keeps, beside transformers' QuantizedCache.

    Each text is read once with the exact cache; every other cache then decodes the same tokens, and its next-token
    distributions are compared with the exact ones. Writes a CSV file and a Pareto plot.
    """
    from fade_eval.cli.pareto import draw
    from fade_eval.contenders import contenders
    from fade_eval.quality import quality as measure

    if calibration is not None and not calibration.is_file():
        raise InputError(f"--calibration {calibration}: there is no such file; fade calibrate writes one")
    chosen = contenders(
        named_caches(config or []),
        n_sink=sinks,
        window=window,
        calibration=str(calibration) if calibration else None,
        only=only or (),
    )
    given = read_texts(text) or _shipped(split)
    output_dir.mkdir(parents=True, exist_ok=True)
    loaded, tokenizer = open_model(model, dtype, device)
    with working(f"{len(chosen)} caches") as advance:
        found = measure(
            loaded,
            tokenizer,
            chosen,
            given,
            prompt_tokens=prompt_tokens,
            steps=steps,
            max_texts=texts,
            steps_per_forward=steps_per_forward,
            batch_size=batch_size,
            long_steps=long_steps,
            needles=needles,
            seed=seed,
            progress=advance,
        )
    about: dict[str, Any] = {
        "model": model,
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": str(loaded.device),
    }
    about |= {"texts": found.texts, "prompt_tokens": prompt_tokens, "steps": steps}
    about |= {"long_steps": long_steps, "batch_size": batch_size}
    write_csv(found, about, output_dir / "quality.csv")
    draw(found.rows, f"{model}, {found.texts} texts of {prompt_tokens} + {steps} tokens", output_dir / "quality.png")
    if json:
        print_json({**about, **found.to_dict()})
        return
    _print(found, about)
    say(f"figures: {output_dir / 'quality.csv'}   plot: {output_dir / 'quality.png'}")


def _shipped(split: Literal["evaluation", "unlike", "calibration"]) -> list[str] | None:
    from fade_eval.texts import passages

    return None if split == "evaluation" else [passage.text for passage in passages(split)]


def write_csv(found: QualityResult, about: dict[str, Any], path: Path) -> None:
    """A line a cache, the circumstances on every line."""
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = [row.to_dict() | about for row in found.rows]
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)


def _print(found: QualityResult, about: dict[str, Any]) -> None:
    for name, reason in found.left_out.items():
        complain(f"left out: {name}: {reason}")
    title = (
        f"{about['model']} ({about['dtype']}, {about['device']}), {found.texts} texts of {found.prompt_tokens} + "
        f"{found.steps} tokens; exact: {found.exact_bytes_per_token:,.0f} bytes a token, perplexity "
        f"{found.exact_perplexity:.3f}"
    )
    columns = ["cache", ">bits", ">bytes a token", ">of 16-bit", ">KL mean", ">p99", ">same top-1", ">perplexity"]
    columns += [f">first 256 of {found.long_steps:,}", ">last quarter"] if found.long_steps else []
    columns += [">needles"] if any(row.needles for row in found.rows) else []
    show_figures(rows(table(title, *columns), [_line(row)[: len(columns)] for row in found.rows]))


def _line(row: QualityRow) -> tuple[str, ...]:
    error = "" if row.kl_standard_error is None else f" ± {row.kl_standard_error:.5f}"
    return (
        row.name,
        "-" if math.isnan(row.bits) else f"{row.bits:.3f}",
        f"{row.bytes_per_token:,.0f}",
        f"{row.ratio_16bit:.3f}",
        f"{row.kl_mean:.5f}{error}",
        f"{row.kl_p99:.3f}",
        f"{row.top1_agreement:.4f}",
        f"{row.perplexity_change:+.2%}",
        *(f"{kl:.5f}" for kl in (row.kl_long_first, row.kl_long_last) if kl is not None),
        f"{row.needles_kept} of {row.needles_exact}",
    )
