"""The registry: what is installed, who owns it, and what is wrong with the rest."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import ModuleType
from typing import Any, Literal, get_args, get_origin

import pluggy
from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from fade_core import hookspecs
from fade_core._version import __version__
from fade_core.errors import PluginError, UnknownComponentError
from fade_core.interfaces import (
    ComponentConfig,
    Kernel,
    PolicyConfig,
    QuantizerConfig,
    RopeConfig,
    TelemetrySinkConfig,
    TierConfig,
)
from fade_core.validation import did_you_mean

Group = Literal["tiers", "quantizers", "policies", "rope_schemes", "kernels", "telemetry_sinks", "eval_tasks"]
Status = Literal["loaded", "failed", "incompatible", "conflict"]

CORE_DIST = "fade-core"
CORE_MODULE = "fade_core.builtin"

_SINGULAR: dict[Group, str] = {
    "tiers": "tier",
    "quantizers": "quantizer",
    "policies": "policy",
    "rope_schemes": "RoPE scheme",
    "kernels": "kernel",
    "telemetry_sinks": "telemetry sink",
    "eval_tasks": "eval task",
}
GROUPS: tuple[Group, ...] = tuple(_SINGULAR)

_BASES: dict[Group, type[ComponentConfig]] = {
    "tiers": TierConfig,
    "quantizers": QuantizerConfig,
    "policies": PolicyConfig,
    "rope_schemes": RopeConfig,
    "telemetry_sinks": TelemetrySinkConfig,
}

_FIRST_PARTY: dict[Group, dict[str, str]] = {
    "quantizers": dict.fromkeys(("rotated", "calibrated", "pq"), "fade-quant-rotated"),
    "tiers": {"pq": "fade-quant-rotated"},
    "policies": {"learned": "fade-policy-learned"},
    "rope_schemes": dict.fromkeys(
        ("default", "linear", "dynamic", "yarn", "longrope", "llama3", "proportional", "none"), "fade-rope"
    ),
    "kernels": {"triton": "fade-kernels-triton"},
}
"""Names that FADE's own plugins provide, for the message that says what to install."""


@dataclass(frozen=True)
class PluginInfo:
    """One row of ``fade plugins``.

    Attributes:
        name: entry-point name.
        dist: distribution that brought it, or its module where there is no distribution.
        version: the distribution's version, or "" where there is none.
        module: module that implements the hooks.
        hooks: hooks that it implements.
        components: names that it provides, by group ("policies": ("h2o", ...)).
        status: "loaded"; "failed" (import or hook raised); "incompatible" (made for another core, not loaded);
            "conflict" (a name that another plugin provides too).
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


@dataclass
class _Plugin:
    """A plugin while it is loaded: what it is, what it gave, what went wrong."""

    name: str
    dist: str
    version: str
    module: str
    implementation: Any = None
    hooks: tuple[str, ...] = ()
    incompatible: str = ""
    failures: list[str] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    @property
    def owner(self) -> str:
        version = f" {self.version}" if self.version else ""
        return f"{self.dist}{version} ({self.module})"

    def fail(self, what: str, error: BaseException) -> None:
        where = traceback.extract_tb(error.__traceback__)
        at = f" at {where[-1].filename}:{where[-1].lineno}" if where else ""
        self.failures.append(f"{what} raised {type(error).__name__}: {error}{at}")
        self.errors.append(error)


@dataclass(frozen=True)
class _Entry:
    """One named component and the plugin that owns it."""

    name: str
    component: Any
    plugin: _Plugin

    @property
    def owner(self) -> str:
        what = self.component if isinstance(self.component, type) else type(self.component)
        return f"{self.plugin.owner}: {what.__module__}.{what.__qualname__}"


class Registry:
    """Plugins and their components, loaded on first use.

    Args:
        modules: modules (or any objects with ``@hookimpl`` functions) to register besides the installed ones.
        entry_points: whether to read the entry points of group ``fade``.
    """

    def __init__(self, modules: Iterable[Any] = (), *, entry_points: bool = True) -> None:
        self._extra = tuple(modules)
        self._use_entry_points = entry_points
        self._entries: dict[Group, dict[str, list[_Entry]]] = {}

    # --- look-up ---
    def names(self, group: Group) -> list[str]:
        """Known names of a group, sorted (for kernels: implementation names, whatever their op)."""
        return sorted({name.rpartition(":")[2] for name in self._group(group)})

    def get(self, group: Group, name: str) -> Any:
        """The component called ``name``: a config class, or the object itself for kernels (``"op:name"``) and tasks.

        Raises:
            UnknownComponentError: if nothing that is loaded provides it; the message says what would.
            PluginError: if two plugins provide it.
        """
        entries = self._group(group).get(name)
        if not entries:
            raise UnknownComponentError(self._unknown(group, name))
        if len(entries) > 1:
            raise PluginError(_conflict(group, entries))
        return entries[0].component

    def all(self, group: Group) -> dict[str, Any]:
        """Every component of a group by name, without those that two plugins claim."""
        return {name: entries[0].component for name, entries in self._group(group).items() if len(entries) == 1}

    def kernels(self, op: str) -> dict[str, Kernel]:
        """Implementations of ``op`` by name. Raises ``PluginError`` if two plugins claim one."""
        prefix = f"{op}:"
        return {
            key.removeprefix(prefix): self.get("kernels", key)
            for key in sorted(self._group("kernels"))
            if key.startswith(prefix)
        }

    def add_commands(self, app: Any) -> None:
        """Let every plugin add its commands to a typer app; one that raises is recorded and skipped."""
        for plugin in self._plugins:
            if "fade_commands" in plugin.hooks:
                self._call(plugin, "fade_commands", app=app)

    # --- what `fade plugins` shows ---
    def list_plugins(self) -> list[PluginInfo]:
        """Every plugin that was found, the broken ones with their reason."""
        components: dict[int, dict[str, tuple[str, ...]]] = defaultdict(dict)
        conflicts: dict[int, list[str]] = defaultdict(list)
        for group in GROUPS:
            by_plugin: dict[int, list[str]] = defaultdict(list)
            for name, entries in self._group(group).items():
                for entry in entries:
                    by_plugin[id(entry.plugin)].append(name)
                if len(entries) > 1:
                    for owner in {id(entry.plugin) for entry in entries}:
                        conflicts[owner].append(_conflict(group, entries))
            for owner, names in by_plugin.items():
                components[owner][group] = tuple(sorted(names))
        return [_describe(plugin, components[id(plugin)], conflicts[id(plugin)]) for plugin in self._plugins]

    # --- loading ---
    @cached_property
    def _manager(self) -> pluggy.PluginManager:
        manager = pluggy.PluginManager(hookspecs.GROUP)
        manager.add_hookspecs(hookspecs)
        return manager

    @cached_property
    def _plugins(self) -> list[_Plugin]:
        plugins: list[_Plugin] = []
        points = importlib.metadata.entry_points(group=hookspecs.GROUP) if self._use_entry_points else ()
        for point in sorted(points, key=lambda p: (p.value != CORE_MODULE, p.name)):
            if any(plugin.module == point.value for plugin in plugins):
                continue  # two entry points that lead to one module are one plugin
            plugins.append(self._load(_from_entry_point(point), point.load, _requirements(point)))
        if not any(plugin.module == CORE_MODULE for plugin in plugins):  # a source tree without metadata
            core = _Plugin("core", CORE_DIST, __version__, CORE_MODULE)
            plugins.insert(0, self._load(core, lambda: importlib.import_module(CORE_MODULE)))
        for extra in self._extra:
            if not any(plugin.implementation is extra for plugin in plugins):
                plugins.append(self._load(_from_object(extra), _constant(extra)))
        return plugins

    def _load(self, plugin: _Plugin, load: Callable[[], Any], requirements: Sequence[str] = ()) -> _Plugin:
        try:
            plugin.incompatible = _refuses_core(requirements, "requires")
            if plugin.incompatible:
                return plugin
            implementation = load()
            declared = getattr(implementation, "FADE_CORE", "")
            plugin.incompatible = _refuses_core([f"{CORE_DIST}{declared}"] if declared else [], "declares")
            if plugin.incompatible:
                return plugin
            plugin.implementation = implementation
        except (Exception, SystemExit) as error:
            plugin.fail("import", error)
            return plugin
        self._register(plugin)
        return plugin

    def _register(self, plugin: _Plugin) -> None:
        known = {name for name in vars(hookspecs) if name.startswith("fade_")}
        hooks_known = f"hooks: {', '.join(sorted(known))}"
        try:
            self._manager.register(plugin.implementation)
            hooks = sorted(caller.name for caller in self._manager.get_hookcallers(plugin.implementation) or [])
            unknown = [name for name in hooks if name not in known]
            if unknown:
                raise PluginError(f"there is no hook {unknown[0]!r}{did_you_mean(unknown[0], known)} ({hooks_known})")
            if not hooks:
                raise PluginError(f"nothing in it is decorated with @hookimpl ({hooks_known})")
        except Exception as error:
            plugin.fail("registration", error)
            if self._manager.is_registered(plugin.implementation):
                self._manager.unregister(plugin.implementation)
            return
        plugin.hooks = tuple(hooks)

    def _call(self, plugin: _Plugin, hook: str, **arguments: Any) -> list[Any]:
        others = [p.implementation for p in self._plugins if p is not plugin and p.implementation is not None]
        try:
            return list(self._manager.subset_hook_caller(hook, others)(**arguments))
        except (Exception, SystemExit) as error:
            plugin.fail(hook, error)
            return []

    def _group(self, group: Group) -> dict[str, list[_Entry]]:
        if group not in self._entries:
            found: dict[str, list[_Entry]] = {}
            for plugin in self._plugins:
                hook = f"fade_{group}"
                if hook not in plugin.hooks:
                    continue
                for answer in self._call(plugin, hook):
                    self._take(group, plugin, answer, found)
            self._entries[group] = found
        return self._entries[group]

    def _take(self, group: Group, plugin: _Plugin, answer: Any, found: dict[str, list[_Entry]]) -> None:
        """Add what one plugin answered to ``found``; what does not fit is recorded as the plugin's failure."""
        hook = f"fade_{group}"
        try:
            if not isinstance(answer, (list, tuple)):
                raise PluginError(f"{hook} must return a list; found {answer!r}")
            for item in answer:
                component = item() if group == "kernels" and isinstance(item, type) else item
                for name in _names_of(group, component):
                    owners = found.setdefault(name, [])
                    if not any(entry.component is component for entry in owners):
                        owners.append(_Entry(name, component, plugin))
        except Exception as error:
            plugin.fail(hook, error)

    def _unknown(self, group: Group, name: str) -> str:
        singular = _SINGULAR[group]
        op, _, short = name.rpartition(":") if group == "kernels" else ("", "", name)
        keys = self._group(group)
        known = sorted(key.removeprefix(f"{op}:") for key in keys if not op or key.startswith(f"{op}:"))
        message = f"unknown {singular} {short!r}{f' for op {op!r}' if op else ''}{did_you_mean(short, known)}"
        message += f" (known: {', '.join(known) or 'none'})"
        owner = _FIRST_PARTY.get(group, {}).get(short)
        if owner:
            message += f"; {owner} provides it: pip install {owner}"
        for plugin in self._plugins:
            trouble = plugin.incompatible or "; ".join(plugin.failures)
            if trouble and (owner is None or canonicalize_name(plugin.dist) == owner):
                message += f"; {plugin.owner} is installed but not usable: {trouble}"
        return message


# --- the registry that everything uses ---

_current: list[Registry] = [Registry()]


def default_registry() -> Registry:
    """The registry that configuration is resolved with."""
    return _current[-1]


@contextlib.contextmanager
def use_registry(registry: Registry) -> Iterator[Registry]:
    """Make ``registry`` the default one inside a ``with`` block (for tests of plugins that are not installed)."""
    _current.append(registry)
    try:
        yield registry
    finally:
        _current.remove(registry)


def list_plugins() -> list[PluginInfo]:
    """Every plugin that was found, what it provides, and why it does not work if it does not."""
    return default_registry().list_plugins()


# --- helpers ---


def _names_of(group: Group, component: Any) -> tuple[str, ...]:
    """Names that a component is registered under. Raises ``PluginError`` for what does not belong in the group."""
    if group == "kernels":
        if not isinstance(component, Kernel) or not component.name:
            raise PluginError(f"fade_kernels takes Kernel objects or classes with a name; found {component!r}")
        return (f"{component.op}:{component.name}",)
    if group == "eval_tasks":
        name = getattr(component, "name", None)
        if not isinstance(name, str) or not name:
            raise PluginError(f"fade_eval_tasks takes tasks with a name; found {component!r}")
        return (name,)
    base = _BASES[group]
    if not isinstance(component, type) or not issubclass(component, base):
        raise PluginError(f"fade_{group} takes subclasses of {base.__name__}; found {component!r}")
    discriminator = "tier" if group == "tiers" else "kind"
    annotation = component.model_fields[discriminator].annotation
    names = get_args(annotation) if get_origin(annotation) is Literal else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise PluginError(
            f'{component.__name__} needs a literal name such as {discriminator}: Literal["mine"] = "mine"; '
            f"found {annotation!r}"
        )
    return tuple(names)


def _conflict(group: Group, entries: Sequence[_Entry]) -> str:
    owners = " and by ".join(entry.owner for entry in entries)
    return f"{_SINGULAR[group]} {entries[0].name!r} is provided by {owners}; uninstall or rename one"


def _describe(plugin: _Plugin, components: dict[str, tuple[str, ...]], conflicts: Sequence[str]) -> PluginInfo:
    status: Status = "loaded"
    if plugin.incompatible:
        status = "incompatible"
    elif plugin.failures:
        status = "failed"
    elif conflicts:
        status = "conflict"
    reason = "; ".join([plugin.incompatible] * bool(plugin.incompatible) + plugin.failures + list(conflicts))
    return PluginInfo(
        plugin.name, plugin.dist, plugin.version, plugin.module, plugin.hooks, dict(components), status, reason
    )


def _from_entry_point(point: importlib.metadata.EntryPoint) -> _Plugin:
    dist = point.dist
    if dist is None:
        return _Plugin(point.name, point.module, "", point.value)
    return _Plugin(point.name, dist.metadata["Name"] or point.module, dist.version, point.value)


def _from_object(extra: Any) -> _Plugin:
    name = extra.__name__ if isinstance(extra, ModuleType) else getattr(extra, "__name__", type(extra).__name__)
    return _Plugin(name, getattr(extra, "FADE_DIST", name), "", name)


def _requirements(point: importlib.metadata.EntryPoint) -> list[str]:
    return list(point.dist.requires or []) if point.dist is not None else []


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


def _refuses_core(requirements: Sequence[str], verb: str) -> str:
    """Why a plugin with these requirements cannot work with this core, or "". Raises ``PluginError`` on nonsense."""
    for text in requirements:
        try:
            requirement = Requirement(text)
            specifiers = SpecifierSet(str(requirement.specifier))
        except (ValueError, InvalidSpecifier) as error:
            if verb == "declares":
                raise PluginError(f'FADE_CORE must be a version range such as ">=0.1,<0.2": {error}') from error
            continue  # another project's requirement that this packaging cannot read
        if canonicalize_name(requirement.name) != CORE_DIST:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not specifiers.contains(__version__, prereleases=True):
            return f"it {verb} {CORE_DIST} {specifiers}, this is {CORE_DIST} {__version__}; install a matching version"
    return ""
