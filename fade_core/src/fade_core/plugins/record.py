"""One plugin: who made it, whether it fits this core, what it gave and what went wrong."""

from __future__ import annotations

import importlib.metadata
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from fade_core._version import __version__
from fade_core.errors import PluginError

CORE_DIST = "fade-core"

Status = Literal["loaded", "failed", "incompatible", "conflict"]


@dataclass(frozen=True)
class PluginInfo:
    """One row of ``fade plugins``.

    Attributes:
        name: entry-point name.
        dist: distribution that brought it, or its module where there is no distribution.
        version: the distribution's version, or "" where there is none.
        module: module that implements the hooks.
        hooks: hooks that it implements.
        components: names that it provides, by group (``{"policies": ("h2o",)}``).
        status: "loaded"; "failed" (import or a hook raised); "incompatible" (made for another core, not loaded);
            "conflict" (provides a name that another plugin provides too).
        reason: why the status is not "loaded".
    """

    name: str
    dist: str
    version: str
    module: str
    hooks: tuple[str, ...]
    components: dict[str, tuple[str, ...]]
    status: Status
    reason: str


@dataclass(eq=False)
class Plugin:
    """A plugin as the registry sees it.

    Attributes:
        implementation: the object with the hooks, ``None`` until it is loaded.
        hooks: names of the hooks that it implements.
        incompatible: why it cannot work with this core, or "".
        failures: what raised, one text each.
    """

    name: str
    dist: str
    version: str
    module: str
    implementation: Any = None
    hooks: tuple[str, ...] = ()
    incompatible: str = ""
    failures: list[str] = field(default_factory=list)

    @classmethod
    def from_entry_point(cls, point: importlib.metadata.EntryPoint) -> Plugin:
        """The plugin that an entry point announces, not loaded yet."""
        if point.dist is None:
            return cls(point.name, point.module, "", point.value)
        return cls(point.name, point.dist.metadata["Name"] or point.module, point.dist.version, point.value)

    @classmethod
    def from_object(cls, implementation: Any) -> Plugin:
        """A plugin that was handed over as a module or object and belongs to no distribution."""
        name = str(getattr(implementation, "__name__", type(implementation).__qualname__))
        return cls(name, name, "", name)

    @property
    def owner(self) -> str:
        """How messages name it: distribution, version and module."""
        if self.dist == self.module:
            return self.module
        return f"{self.dist} {self.version} ({self.module})" if self.version else f"{self.dist} ({self.module})"

    @property
    def trouble(self) -> str:
        """Why it does not work, or not fully; "" if it does."""
        return self.incompatible or "; ".join(self.failures)

    def fail(self, what: str, error: BaseException) -> None:
        """Keep the reason of a failure."""
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        at = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames and not isinstance(error, PluginError) else ""
        self.failures.append(f"{what} raised {type(error).__name__}: {error}{at}")

    def describe(self, components: dict[str, tuple[str, ...]], conflicts: list[str]) -> PluginInfo:
        """The row of ``fade plugins``, given what the registry knows about names."""
        status: Status = "conflict" if conflicts else "loaded"
        if self.trouble:
            status = "incompatible" if self.incompatible else "failed"
        reason = "; ".join(text for text in (self.trouble, *conflicts) if text)
        return PluginInfo(self.name, self.dist, self.version, self.module, self.hooks, components, status, reason)


def refusal_by_requirements(requirements: Iterable[str]) -> str:
    """Why a distribution with these requirements (``Requires-Dist``) does not fit this core, or ""."""
    for text in requirements:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue  # some other package, in a spelling of its own
        if canonicalize_name(requirement.name) != CORE_DIST:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            return _refusal("its distribution requires", str(requirement.specifier))
    return ""


def refusal_by_declaration(declared: object) -> str:
    """Why a plugin whose ``FADE_CORE`` is ``declared`` does not fit this core, or "".

    Raises:
        PluginError: if it is not a version range.
    """
    try:
        specifiers = SpecifierSet(str(declared))
    except InvalidSpecifier as error:
        raise PluginError(f'FADE_CORE is a version range such as ">=0.1,<0.2"; found {declared!r}') from error
    return (
        "" if specifiers.contains(__version__, prereleases=True) else _refusal("it declares FADE_CORE", str(declared))
    )


def _refusal(who: str, wanted: str) -> str:
    return f"{who} {wanted}, but this is {CORE_DIST} {__version__}; install versions that fit"
