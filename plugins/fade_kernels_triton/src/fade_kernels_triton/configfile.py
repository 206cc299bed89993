"""Files of launch configurations: the one that is shipped, and the user's own for one GPU."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from fade_core.errors import ConfigError
from fade_kernels_triton.launch import DecodeConfig, LaunchCase
from fade_kernels_triton.operands import HEAD_DIMS, MAX_COLUMNS, TILES, WIDTHS

REMEDY = "Mend or delete the file, or have it written again: fade bench tune"


@dataclass(frozen=True)
class ConfigFile:
    """What a file says.

    Attributes:
        gpu: name of the GPU that the configurations were found on, as torch gives it.
        decode: cases of ``decode_attention`` and the fastest configuration found for each.
    """

    gpu: str
    decode: tuple[tuple[LaunchCase, DecodeConfig], ...]

    def with_row(self, case: LaunchCase, config: DecodeConfig) -> ConfigFile:
        """The same with ``config`` for ``case``, in place of the row that had that case."""
        rows = dict(self.decode)
        rows[case] = config
        return ConfigFile(self.gpu, tuple(rows.items()))


@dataclass(frozen=True)
class _Rule:
    takes: Callable[[Any], bool]
    words: str


def _one_of(*values: object) -> _Rule:
    words = ", ".join(json.dumps(value) for value in values)
    return _Rule(lambda value: any(type(value) is type(v) and value == v for v in values), words)


def _whole(low: int, high: int | None = None) -> _Rule:
    words = f"a whole number from {low} up" if high is None else f"a whole number from {low} to {high}"
    return _Rule(lambda value: type(value) is int and low <= value and (high is None or value <= high), words)


CASE_RULES: Mapping[str, _Rule] = {
    "bits": _one_of(*sorted({values for _, values in WIDTHS})),
    "axis": _one_of("token", "channel"),
    "tile": _one_of(*TILES),
    "head_dim": _one_of(*HEAD_DIMS),
    "columns": _whole(1, MAX_COLUMNS),
    "rows_and_heads": _whole(1),
    "context": _whole(1),
}
CONFIG_RULES: Mapping[str, _Rule] = {
    "warps": _one_of(1, 2, 4, 8, 16),
    "stages": _whole(1, 8),
    "resident": _whole(1, 32),
    "overlap": _one_of(False, True),
    "registers": _whole(0, 255),
    "subnormal": _one_of(False, True),
}


def user_file(gpu: str) -> Path:
    """The user's own file for a GPU: ``fade/decode-<gpu>.json`` in ``$XDG_CONFIG_HOME``, by default ``~/.config``."""
    slug = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "fade" / f"decode-{slug}.json"


def read_file(path: Path) -> ConfigFile:
    """What the file at ``path`` says. Raises ``ConfigError`` if it cannot be read or a row of it cannot work."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"kernel configurations {path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"kernel configurations {path} cannot be read: {error}") from error
    return parse(text, str(path))


def write_file(path: Path, held: ConfigFile) -> None:
    """Write ``held``, a row a line, in place of what is there. Raises ``ConfigError`` if that cannot be done."""
    rows = [f"    {json.dumps({'case': asdict(case), 'config': asdict(config)})}" for case, config in held.decode]
    listed = "\n" + ",\n".join(rows) + "\n  " if rows else ""
    text = f'{{\n  "gpu": {json.dumps(held.gpu)},\n  "decode": [{listed}]\n}}\n'
    fresh = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise ConfigError(f"kernel configurations {path} cannot be written: {error}. Name another: --output") from error


def parse(text: str, where: str) -> ConfigFile:
    """What ``text`` says; ``where`` is what errors call it. Raises ``ConfigError`` naming file, row and what would work."""
    where = f"kernel configurations {where}"
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{where} is not JSON: {error}. {REMEDY}") from error
    if not isinstance(data, dict) or set(data) != {"gpu", "decode"}:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ConfigError(f'{where} holds {found}; an object of "gpu" and "decode" is read. {REMEDY}')
    if not isinstance(data["gpu"], str) or not isinstance(data["decode"], list):
        raise ConfigError(f'{where}: "gpu" is a name and "decode" a list of rows. {REMEDY}')
    rows: dict[LaunchCase, DecodeConfig] = {}
    for number, row in enumerate(data["decode"], 1):
        case, config = _row(row, f"{where}, row {number}")
        if case in rows:
            raise ConfigError(f"{where}, row {number}: the case of row {list(rows).index(case) + 1} again. Delete one")
        rows[case] = config
    return ConfigFile(data["gpu"], tuple(rows.items()))


def _row(row: object, where: str) -> tuple[LaunchCase, DecodeConfig]:
    if not isinstance(row, dict) or set(row) != {"case", "config"}:
        raise ConfigError(f'{where} is {json.dumps(row)}; an object of "case" and "config" is read. {REMEDY}')
    _check(row["case"], CASE_RULES, f"{where}, case", required={field.name for field in fields(LaunchCase)})
    _check(row["config"], CONFIG_RULES, f"{where}, config", required=set())
    return LaunchCase(**row["case"]), DecodeConfig(**row["config"])


def _check(values: object, rules: Mapping[str, _Rule], where: str, required: set[str]) -> None:
    """Refuse what ``rules`` do not take."""
    if not isinstance(values, dict):
        raise ConfigError(f"{where} is {json.dumps(values)}; an object of {', '.join(rules)} is read. {REMEDY}")
    if unknown := sorted(set(values) - set(rules)):
        raise ConfigError(f"{where} has {', '.join(unknown)}; the fields are {', '.join(rules)}. {REMEDY}")
    if missing := sorted(required - set(values)):
        raise ConfigError(f"{where} lacks {', '.join(missing)}. {REMEDY}")
    for name, value in values.items():
        if not rules[name].takes(value):
            raise ConfigError(f"{where}: {name} is {json.dumps(value)}; it takes {rules[name].words}. {REMEDY}")
