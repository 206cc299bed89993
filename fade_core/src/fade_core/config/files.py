"""Configuration files: one table from TOML, YAML or JSON, chosen by the extension."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, Literal

import tomli_w
import yaml

from fade_core.errors import ConfigError

_FORMATS = {".toml": "TOML", ".yaml": "YAML", ".yml": "YAML", ".json": "JSON"}


def read_table(path: str | Path) -> dict[str, Any]:
    """The table that a file holds.

    Raises:
        ConfigError: if the file is missing, empty, not what its extension says, or holds something else than a table.
    """
    path = Path(path)
    name = _format_of(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as {name}: {error}") from error
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty; for the defaults write `n_sink = 4` or leave the file out")
    try:
        table = _READERS[name](text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid {name}: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: a table of fields is needed; found {type(table).__name__} {str(table)[:60]!r}")
    return table


def write_table(path: str | Path, table: Mapping[str, Any]) -> None:
    """Write a table in the format of the extension. Raises ``ConfigError`` for a value that the format cannot hold."""
    path = Path(path)
    path.write_text(_WRITERS[_format_of(path)](table), encoding="utf-8")


def render_table(table: Mapping[str, Any], format: Literal["toml", "yaml", "json"]) -> str:
    """A table as text. Raises ``ConfigError`` for a value that the format cannot hold."""
    return _WRITERS[format.upper()](table)


def _format_of(path: Path) -> str:
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise ConfigError(
            f"{path}: the extension {path.suffix!r} names no format; use one of {', '.join(_FORMATS)}"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise ValueError(f"{key!r} is written twice")
        table[key] = value
    return table


class _UniqueLoader(yaml.SafeLoader):
    """YAML's safe loader, refusing a key that is written twice."""


def _mapping(loader: _UniqueLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    loader.flatten_mapping(node)
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.MarkedYAMLError(problem=f"{key!r} is written twice", problem_mark=node.start_mark)
    return loader.construct_mapping(node, deep=True)


_UniqueLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _to_toml(table: Mapping[str, Any]) -> str:
    _refuse_null(table, "")
    return tomli_w.dumps(table)


def _refuse_null(value: Any, path: str) -> None:
    if value is None:
        raise ConfigError(f"TOML has no null, which {path} is; write a .yaml or .json file")
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _refuse_null(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            _refuse_null(inner, f"{path}.{place}")


_READERS: dict[str, Callable[[str], Any]] = {
    "TOML": tomllib.loads,
    "YAML": lambda text: yaml.load(text, Loader=_UniqueLoader),  # a SafeLoader
    "JSON": lambda text: json.loads(text, object_pairs_hook=_unique),
}
_WRITERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "TOML": _to_toml,
    "YAML": lambda table: yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=False),
    "JSON": lambda table: json.dumps(table, indent=2, ensure_ascii=False) + "\n",
}
