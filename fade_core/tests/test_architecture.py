"""The page on architecture names what there is: modules, files, classes, methods, rooms and the rules of storage."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import DOCS, first_column

import fade_core
from fade_core import storage

PACKAGE = Path(inspect.getfile(fade_core)).parent
PAGE = (DOCS / "architecture.md").read_text()
ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
QUOTED = sorted(set(re.findall(r"`([^`\n]+)`", PAGE)))
FILES = sorted(set(re.findall(r"[\w/]+\.py\b", PAGE)))


@functools.cache
def modules() -> list[Any]:
    """Every module of the package, imported."""
    found = pkgutil.walk_packages(fade_core.__path__, "fade_core.")
    return [importlib.import_module(module.name) for module in found if not module.name.endswith("__main__")]


@functools.cache
def defined() -> dict[str, Any]:
    """Every class and function of the package, by its name."""
    return {
        name: value
        for module in modules()
        for name, value in vars(module).items()
        if (inspect.isclass(value) or callable(value)) and getattr(value, "__module__", "") == module.__name__
    }


def exists(name: str) -> bool:
    """Whether the package has what the page calls ``name``."""
    modules()  # the ops are registered as they are imported
    if re.fullmatch(r"fade::\w+", name):
        return hasattr(torch.ops.fade, name.removeprefix("fade::"))
    if re.fullmatch(r"fade_core(\.\w+)+", name):
        return name in {module.__name__ for module in modules()}
    if re.fullmatch(r"[A-Z]\w*\.\w+", name):
        owner, member = name.split(".")
        return owner in defined() and (hasattr(defined()[owner], member) or _is_attribute(defined()[owner], member))
    if re.fullmatch(r"[A-Z]\w*", name):
        return name in defined()
    if re.fullmatch(r"\w+\.\w+", name):  # a field of a component, such as policy.every
        return all(_is_word(part) for part in name.split("."))
    return bool(re.fullmatch(r"\w+", name)) and _is_word(name)


def _is_attribute(owner: type, member: str) -> bool:
    """Whether a class sets ``member`` on its objects, or declares it."""
    sources = [inspect.getsource(base) for base in owner.__mro__ if base.__module__.startswith("fade_core")]
    return any(re.search(rf"(self\.|^    ){member}\b\s*(:|=|,)", source, re.MULTILINE) for source in sources)


@functools.cache
def _words() -> set[str]:
    words: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            words |= {str(getattr(node, kind)) for kind in ("name", "id", "arg", "attr") if hasattr(node, kind)}
    return words


def _is_word(name: str) -> bool:
    """Whether ``name`` is an identifier, a folder or a module of the package."""
    return name in _words() | {part for module in modules() for part in module.__name__.split(".")}


@pytest.mark.parametrize("name", [name for name in QUOTED if "/" not in name and not name.endswith(".py")])
def test_each_name_on_the_page_exists(name: str) -> None:
    assert exists(name)


@pytest.mark.parametrize("file", FILES)
def test_each_file_on_the_page_exists(file: str) -> None:
    assert (PACKAGE / file).is_file()


def test_each_function_of_a_file_is_there() -> None:
    found = re.findall(r"`(\w+)` in `([\w/]+)\.py`", PAGE)
    assert found
    for function, path in found:
        module = importlib.import_module(f"fade_core.{path.replace('/', '.')}")
        assert getattr(module, function).__module__ == module.__name__


def test_what_does_not_exist_is_noticed() -> None:
    for name in ("fade_core.tierstore", "TierStore.let_go", "FixedStore", "fade::decode", "no_such_word", "a.b c"):
        assert not exists(name), name


def test_every_room_is_on_the_page_in_the_order_in_which_they_import() -> None:
    rooms = first_column(PAGE, "room")
    assert sorted(rooms) == ROOMS
    for height, room in enumerate(rooms):
        for path in (PACKAGE / room).rglob("*.py"):
            imported = set(re.findall(r"^\s*(?:from|import) fade_core\.(\w+)", path.read_text(), re.MULTILINE))
            assert not imported & set(rooms[:height]), f"{path} imports a room above it"


def test_every_rule_of_storage_is_on_the_page() -> None:
    text = re.sub(r"\s+", " ", str(storage.__doc__).replace("``", "`"))
    rules = re.split(r" \d\. ", text)[1:]
    rules[-1:] = rules[-1].split(" `max_cache_len`", 1)
    rules[-1] = "`max_cache_len`" + rules[-1]
    assert len(rules) >= 6
    page = re.sub(r"\s+", " ", PAGE)
    for rule in rules:
        assert rule.strip() in page
