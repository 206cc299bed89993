"""``fade eval sensitivity``: which layers deserve more bits, as a table, a plot and lines for a configuration file."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fade_core.cli.console import errors, out, print_json, rows, table, working
from fade_core.cli.options import Device, Dtype, Json, Model, TextFiles, open_model, read_texts

if TYPE_CHECKING:
    from fade_eval.kl import DivergenceResult
    from fade_eval.sensitivity import SensitivityResult


def sensitivity(
    model: Model = "smollm2",
    config: Annotated[
        str, typer.Option("--config", "-c", help="A preset (safe, balanced, aggressive) or a .toml/.yaml/.json file.")
    ] = "safe",
    worst: Annotated[int, typer.Option(min=0, help="Layers to give more bits; 0 for none.")] = 3,
    output_dir: Annotated[Path, typer.Option(help="Where sensitivity.csv and sensitivity.png go.")] = Path(
        "fade-sensitivity"
    ),
    text: TextFiles = None,
    texts: Annotated[int, typer.Option(min=1, help="Texts to take.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens fed at once before measuring.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Tokens decoded through the cache, a text.")] = 64,
    steps_per_forward: Annotated[int, typer.Option(min=1, help="More than 1 is faster and close to it.")] = 1,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts decoded side by side: faster.")] = 4,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Which layers deserve more bits: each one compressed alone, all others exact.

    Ranks the layers by the divergence that each causes, and tries the worst ones with more bits: what that brings is
    printed with the lines that do it.
    """
    from fade_core.cache.named_caches import configuration
    from fade_eval.cli.layerplot import draw
    from fade_eval.finer import as_toml, finer_layers
    from fade_eval.kl import divergence
    from fade_eval.sensitivity import sensitivity as measure

    chosen, given = configuration(config), read_texts(text)
    output_dir.mkdir(parents=True, exist_ok=True)
    loaded, tokenizer = open_model(model, dtype, device)
    sizes: dict[str, Any] = {"tokenizer": tokenizer, "prompt_tokens": prompt_tokens, "steps": steps}
    sizes |= {"max_texts": texts, "steps_per_forward": steps_per_forward, "batch_size": batch_size}
    with working("one layer at a time") as advance:
        found = measure(loaded, chosen, given, **sizes, progress=advance)
    picked = [layer.layer for layer in found.ranked[:worst] if layer.kl_mean > 0]
    overrides = finer_layers(loaded, chosen, picked) if picked else {}
    refined, snippet = None, ""
    if overrides and overrides != chosen.to_dict()["layers"]:
        snippet = as_toml(overrides)
        finer = chosen.with_overrides(layers=overrides)
        with working(f"more bits in layers {', '.join(map(str, picked))}") as advance:
            before = divergence(loaded, given, chosen, **sizes) if chosen.policy.budget is not None else found.together
            refined = divergence(loaded, given, finer, **sizes, progress=advance)
    _write_csv(found, output_dir / "sensitivity.csv")
    draw(found, picked, f"{model}, {config}: one layer compressed at a time", output_dir / "sensitivity.png")
    if json:
        after = None if refined is None else {"before": before.to_dict(), "after": refined.to_dict(), "toml": snippet}
        ranked = [layer.to_dict() for layer in found.ranked]
        print_json(
            {"model": model, "config": config, "layers": ranked, "together": found.together.to_dict(), "finer": after}
        )
        return
    _print(found, f"{model}, {config}: one layer compressed at a time, the others exact")
    if refined is not None:
        _print_finer(picked, before, refined, snippet)
    else:
        errors.print("no layer was tried with more bits", highlight=False)
    shown = f"figures: {output_dir / 'sensitivity.csv'}   plot: {output_dir / 'sensitivity.png'}"
    out.print(shown, markup=False, soft_wrap=True)


def _print(found: SensitivityResult, title: str) -> None:
    lines = [
        (
            str(layer.layer),
            _kl(layer.kl_mean, layer.kl_standard_error),
            f"{layer.kl_p99:.4f}",
            f"{layer.top1_agreement:.4f}",
        )
        for layer in found.ranked
    ]
    shares = [f"{layer.share:.1%}" for layer in found.ranked]
    together = found.together
    lines.append(
        (
            "all together",
            _kl(together.kl_mean, together.kl_standard_error),
            f"{together.kl_p99:.4f}",
            f"{together.top1_agreement:.4f}",
        )
    )
    made = table(title, "layer", ">KL mean", ">p99", ">same top-1", ">of the sum")
    out.print(rows(made, [(*line, share) for line, share in zip(lines, [*shares, ""], strict=True)]))
    out.print(f"sum over the layers: {found.sum:.6f}", highlight=False)


def _print_finer(picked: list[int], before: DivergenceResult, refined: DivergenceResult, snippet: str) -> None:
    held = refined.held.cache / before.held.cache
    out.print(
        f"\nlayers {', '.join(map(str, picked))} with more bits: KL {_kl(before.kl_mean, before.kl_standard_error)} becomes "
        f"{_kl(refined.kl_mean, refined.kl_standard_error)}, the cache holds {held:.3f} times the bytes\n",
        highlight=False,
        soft_wrap=True,
    )
    out.out(snippet, highlight=False)
    out.print()


def _kl(mean: float, error: float | None) -> str:
    return f"{mean:.6f}" if error is None else f"{mean:.6f} ± {error:.6f}"


def _write_csv(found: SensitivityResult, path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = [layer.to_dict() for layer in found.layers]
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
