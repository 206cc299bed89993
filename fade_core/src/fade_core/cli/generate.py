"""``fade generate``: text from a model through a compressed cache, with what it held."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fade_core.cli.console import errors, out, print_json, rows, size, table
from fade_core.cli.options import EXACT, Cache, Device, Dtype, Json, Model, open_model
from fade_core.errors import InputError


def generate(
    prompt: Annotated[str | None, typer.Argument(help='The prompt; "-" reads standard input.')] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    model: Model = "smollm2",
    config: Cache = "safe",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 decodes greedily.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Seed of sampling.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not wrap the prompt in the model's chat template.")] = False,
    dtype: Dtype = "auto",
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Generate text with a compressed cache; the text streams to stdout, the report goes to stderr."""
    from fade_core.cache.named_caches import factory_of, opened
    from fade_core.cli.options import named_caches
    from fade_core.cli.prompts import chat_ids
    from fade_core.cli.streaming import TokenWatch

    text = _prompt(prompt, file)
    cache_like = EXACT if config == EXACT else named_caches([config])[Path(config).stem]
    loaded, tokenizer = open_model(model, dtype, device)
    ids = chat_ids(tokenizer, text, raw).to(loaded.device)
    watch = TokenWatch(tokenizer, None if json else _write)
    with opened(factory_of(cache_like), loaded) as cache:
        tokens = run_generate(loaded, tokenizer, ids, cache, max_new_tokens, watch, temperature, seed)
        report = _report(cache, loaded, watch, ids.shape[1], len(tokens))
    if json:
        print_json({"text": tokenizer.decode(tokens, skip_special_tokens=True), **report})
        return
    out.print()
    shown = [(name.replace("_", " "), value) for name, value in report.items() if not isinstance(value, dict)]
    shown = [(name, size(value) if name.endswith("bytes") else value) for name, value in shown]
    shown += [(f"tier {name}", size(held)) for name, held in report["tiers"].items()]
    errors.print(rows(table("", "cache", ">"), [(name, _rounded(value)) for name, value in shown]))


def run_generate(
    model: Any,
    tokenizer: Any,
    ids: Any,
    cache: Any,
    max_new_tokens: int,
    watch: Any,
    temperature: float = 0.0,
    seed: int | None = None,
) -> list[int]:
    """Tokens that ``model.generate`` adds to ``ids`` ``[1, T]`` through ``cache``; by FADE's own loop on a GPU."""
    import torch

    from fade_core import TieredKVCache, decode_loop

    own = ids.device.type == "cuda" and isinstance(cache, TieredKVCache)
    if seed is not None:
        torch.manual_seed(seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        streamer=watch,
        custom_generate=decode_loop if own else None,
        **sampling,
    )
    return list(found[0, ids.shape[1] :].tolist())


def _prompt(prompt: str | None, file: Path | None) -> str:
    if (prompt is None) == (file is None):
        raise InputError('give one prompt: as an argument, with --file, or "-" to read standard input')
    if file is None:
        return sys.stdin.read() if prompt == "-" else str(prompt)
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompt file {file} cannot be read: {error}") from error


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _rounded(value: object) -> object:
    return f"{value:.3g}" if isinstance(value, float) else value


def _report(cache: Any, model: Any, watch: Any, prompt_tokens: int, new_tokens: int) -> dict[str, Any]:
    from fade_core.support.memory import live_bytes

    held = live_bytes(cache, exclude=model)
    found: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "tokens_per_second": watch.tokens_per_second,
        "held_bytes": held,
        "tiers": {},
    }
    if hasattr(cache, "memory_report"):
        report = cache.memory_report()
        found["exact_bytes"] = report.baseline
        found["ratio"] = held / report.baseline
        found["tiers"] = report.by("tier")
    return found
