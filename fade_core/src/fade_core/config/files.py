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
from fade_core.support.validation import shown
from fade_core.support.writing import replacing

_FORMATS = {".toml": "TOML", ".yaml": "YAML", ".yml": "YAML", ".json": "JSON"}


_MOST_BYTES, _MOST_VALUES, _DEEPEST = 2**16, 5000, 32
"""What a model of hundreds of layers, each with fields of its own, needs a tenth of; more would take seconds to read."""


def read_table(path: str | Path) -> dict[str, Any]:
    """The table that a file holds.

    Raises:
        ConfigError: if the file is missing, empty, larger than any configuration, not what its extension says, or holds
            something else than a table.
    """
    path = Path(path)
    name = _format_of(path)
    try:
        if not path.exists():
            raise ConfigError(f"{path}: no such file")
        if not path.is_file():
            raise ConfigError(f"{path}: cannot be read as {name}: it is no file")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # bytes that are no text; a name that no file can have
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read as {name}: {error}") from error
    if len(content) > _MOST_BYTES:
        raise ConfigError(f"{path}: not valid {name}: larger than {_MOST_BYTES // 1024} KiB, which no configuration is")
    if not text.strip():
        raise ConfigError(f"{path}: the file is empty; for the defaults write `n_sink = 4` or leave the file out")
    try:
        table = _READERS[name](text)
        _check_size(table)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid {name}: {' '.join(str(error).split())}") from error
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: a table of fields is needed; found {type(table).__name__} {shown(table)}")
    return table


def write_table(path: str | Path, table: Mapping[str, Any]) -> None:
    """Write a table in the format of the extension, whole or not at all.

    Raises:
        ConfigError: for a value that the format cannot hold, or a file that cannot be written.
    """
    text = _WRITERS[_format_of(Path(path))](table)
    with replacing(path, ConfigError) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def _check_size(table: Any) -> None:
    """Refuse more values than a configuration has. Raises ``ValueError``."""
    level, values = [table], 0
    while level:
        values += len(level)
        if values > _MOST_VALUES:
            raise ValueError(_TOO_MANY)
        inner = [list(one.values()) if isinstance(one, dict) else one for one in level if isinstance(one, (dict, list))]
        level = [value for values in inner for value in values]


_TOO_MANY = f"more than {_MOST_VALUES:,} values, which no configuration has"


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader for plain values: what JSON has. Refuses a key that is written twice, and a file that its
    aliases make large: each is counted as what it stands for.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._values = self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        alias, before = self.check_event(yaml.AliasEvent), self._values
        mark = None if parent is None else parent.start_mark
        self._values += 1
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"nested more than {_DEEPEST} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and alias:
            if node not in self._sizes:
                raise yaml.MarkedYAMLError(problem="an alias stands for what it is part of", problem_mark=mark)
            self._values = before + self._sizes[node]
        elif node is not None:
            self._sizes[node] = self._values - before
        if self._values > _MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=_TOO_MANY, problem_mark=mark)
        return node

    def mapping(self, node: yaml.Node) -> dict[Hashable, Any]:
        """The table of a node. Raises ``YAMLError`` for a key that is written twice."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="a table is needed here", problem_mark=node.start_mark)
        self.flatten_mapping(node)
        known: set[Hashable] = set()
        for written, _ in node.value:
            key = self.construct_object(written, deep=True)
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise yaml.MarkedYAMLError(problem="a key is text or a number", problem_mark=written.start_mark)
            if key in known:
                raise yaml.MarkedYAMLError(problem=f"{key!r} is written twice", problem_mark=written.start_mark)
            known.add(key)
        return self.construct_mapping(node, deep=True)

    def scalar(self, node: yaml.Node) -> Any:
        """The value of a node that is neither a table nor a list. Raises ``YAMLError`` if its tag says something else."""
        try:
            return yaml.SafeLoader.yaml_constructors[node.tag](self, node)
        except (LookupError, ValueError) as error:  # "!!int x", "!!bool 3", a number of thousands of digits
            kind = node.tag.rpartition(":")[2]
            raise yaml.MarkedYAMLError(problem=f"this is no {kind}", problem_mark=node.start_mark) from error


_TAG = "tag:yaml.org,2002:"
_PlainLoader.yaml_constructors = {
    **{_TAG + kind: _PlainLoader.scalar for kind in ("null", "bool", "int", "float", "str")},
    _TAG + "seq": yaml.SafeLoader.construct_yaml_seq,
    _TAG + "map": _PlainLoader.mapping,
    None: yaml.SafeLoader.construct_undefined,  # refuses
}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in known if tag in _PlainLoader.yaml_constructors or tag == f"{_TAG}merge"]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


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
    "YAML": lambda text: yaml.load(text, Loader=_PlainLoader),  # a SafeLoader
    "JSON": lambda text: json.loads(text, object_pairs_hook=_unique),
}
_WRITERS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "TOML": _to_toml,
    "YAML": lambda table: yaml.safe_dump(dict(table), sort_keys=False, allow_unicode=False),
    "JSON": lambda table: json.dumps(table, indent=2, ensure_ascii=False) + "\n",
}
