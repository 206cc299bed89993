"""Plugins for tests: modules made on the spot, and real distributions in a folder on ``sys.path``."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import pytest
from pydantic import create_model
from torch import Tensor

from fade_core import EvictionPolicy, LayerView, PolicyConfig, hookimpl


def plugin(name: str, *hooks: Callable[..., Any], **attributes: Any) -> ModuleType:
    """A module called ``name`` whose ``@hookimpl`` functions are ``hooks``."""
    module = ModuleType(name)
    for hook in hooks:
        setattr(module, hook.__name__, hookimpl(hook))
    vars(module).update(attributes)
    return module


def provider(name: str, group: str, *components: Any) -> ModuleType:
    """A module called ``name`` that provides ``components`` of one group."""
    module = ModuleType(name)

    def hook() -> list[Any]:
        return list(components)

    hook.__name__ = f"fade_{group}"
    setattr(module, hook.__name__, hookimpl(hook))
    return module


class Newest(EvictionPolicy):
    def score(self, view: LayerView) -> Tensor:
        return view.positions.float()


class NewestConfig(PolicyConfig):
    def build(self) -> EvictionPolicy:
        return Newest()


def policy_config(kind: str) -> type[PolicyConfig]:
    """A configuration class called ``kind`` of a policy that keeps the newest."""

    name = f"{kind.capitalize()}Config"
    return create_model(name, __base__=NewestConfig, __module__=__name__, kind=(Literal[kind], kind))


POLICY_SOURCE = """
    from typing import Literal
    from fade_core import EvictionPolicy, PolicyConfig, hookimpl

    class Mine(EvictionPolicy):
        def score(self, view):
            return -view.positions.float()

    class MineConfig(PolicyConfig):
        kind: Literal["{kind}"] = "{kind}"

        def build(self):
            return Mine()

    @hookimpl
    def fade_policies():
        return [MineConfig]
"""


class Site:
    """A folder on ``sys.path`` into which distributions are written as pip would."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.monkeypatch = folder, monkeypatch
        monkeypatch.syspath_prepend(folder)

    def install(
        self, dist: str, source: str, version: str = "1.0", requires: Iterable[str] = (), entries: str | None = None
    ) -> str:
        """Install ``dist`` with one module; returns the module's name."""
        module = dist.replace("-", "_")
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {dist}", f"Version: {version}"]
        lines += [f"Requires-Dist: {text}" for text in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n")
        (info / "entry_points.txt").write_text(f"[fade]\n{entries or f'{module} = {module}'}\n")
        self.monkeypatch.delitem(sys.modules, module, raising=False)
        self.monkeypatch.syspath_prepend(self.folder)  # drops what importlib remembers of the folder
        return module
