"""The registry: what is installed, who owns it, and what is wrong with the rest."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import pluggy
from packaging.utils import canonicalize_name

from fade_core._version import __version__
from fade_core.errors import PluginError, UnknownComponentError
from fade_core.interfaces import (
    ComponentConfig,
    Kernel,
    PolicyConfig,
    Preset,
    QuantizerConfig,
    Recipe,
    RopeConfig,
    TelemetrySinkConfig,
    TierConfig,
)
from fade_core.plugins.record import CORE_DIST, Plugin, PluginInfo, refusal_by_declaration, refusal_by_requirements
from fade_core.support.validation import did_you_mean, shown

hookspecs = importlib.import_module("fade_core.plugins.hookspecs")

Group = Literal[
    "tiers", "quantizers", "policies", "rope_schemes", "kernels", "telemetry_sinks", "eval_tasks", "presets"
]

CORE_MODULE = "fade_core.builtin"

_SINGULAR: dict[Group, str] = {
    "tiers": "tier",
    "quantizers": "quantizer",
    "policies": "policy",
    "rope_schemes": "RoPE scheme",
    "kernels": "kernel",
    "telemetry_sinks": "telemetry sink",
    "eval_tasks": "eval task",
    "presets": "preset",
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
    "quantizers": dict.fromkeys(("rotated", "calibrated", "self-calibrated", "pq"), "fade-quant-rotated"),
    "tiers": {"pq": "fade-quant-rotated"},
    "policies": {
        "learned": "fade-policy-learned",
        **dict.fromkeys(
            ("adakv", "expected_attention", "key_norm", "keydiff", "kvzip", "normalised_h2o", "snapkv", "tova"),
            "fade-policy-attention",
        ),
    },
    "rope_schemes": dict.fromkeys(
        ("auto", "default", "dynamic", "linear", "llama3", "longrope", "mrope", "none", "ntk", "proportional", "yarn"),
        "fade-rope",
    ),
    "kernels": {"triton": "fade-kernels-triton", "cpu": "fade-kernels-cpu"},
    "presets": dict.fromkeys(("compact", "faithful"), "fade-quant-rotated"),
}
"""Names that FADE's own plugins provide, for the message that says what to install."""


@dataclass(frozen=True)
class _Entry:
    """One named component and the plugin that owns it."""

    name: str
    component: Any
    plugin: Plugin

    @property
    def owner(self) -> str:
        what = self.component if isinstance(self.component, type) else type(self.component)
        return f"{self.plugin.owner}: {what.__module__}.{what.__qualname__}"


class Registry:
    """Plugins and their components, loaded on first use.

    Args:
        modules: modules (or any objects with ``@hookimpl`` functions) to register besides the installed ones.
        entry_points: whether to read the entry points of group ``fade``; the core's own components are there anyway.
    """

    def __init__(self, modules: Iterable[Any] = (), *, entry_points: bool = True) -> None:
        self._extra = tuple(modules)
        self._use_entry_points = entry_points
        self._lock = threading.RLock()
        self.reload()

    def reload(self) -> None:
        """Forget everything; the next look-up reads the entry points again."""
        self._manager = pluggy.PluginManager(hookspecs.GROUP)
        self._manager.add_hookspecs(hookspecs)
        self._loaded: list[Plugin] | None = None
        self._loading = ""
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

    def has(self, group: Group, name: str) -> bool:
        """Whether any plugin provides ``name``, even if two do."""
        return name in self._group(group)

    def kernels(self, op: str) -> dict[str, Kernel]:
        """Implementations of ``op`` by name, without those that two plugins claim."""
        prefix = f"{op}:"
        return {key.removeprefix(prefix): k for key, k in self.all("kernels").items() if key.startswith(prefix)}

    def add_commands(self, app: Any) -> None:
        """Let every plugin add its commands to a typer app; one that raises is recorded and skipped."""
        for plugin in self._plugins:
            if "fade_commands" in plugin.hooks:
                self._call(plugin, "fade_commands", app=app)

    def quality_recipes(self, calibration: str | None = None) -> list[Recipe]:
        """What the plugins want compared, the core's first; one that raises is recorded and skipped.

        Raises:
            PluginError: if two plugins bring recipes of one name.
        """
        owners: dict[str, Plugin] = {}
        found: list[Recipe] = []
        for plugin in self._plugins:
            if "fade_quality_recipes" not in plugin.hooks:
                continue
            for answer in self._call(plugin, "fade_quality_recipes", calibration=calibration):
                if not isinstance(answer, (list, tuple)) or not all(isinstance(item, Recipe) for item in answer):
                    wrong = PluginError(f"fade_quality_recipes must return a list of Recipe; found {answer!r}")
                    plugin.fail("fade_quality_recipes", wrong)
                    continue
                for recipe in answer:
                    if recipe.name in owners:
                        raise PluginError(
                            f"quality recipe {recipe.name!r} is provided by {owners[recipe.name].owner} and by "
                            f"{plugin.owner}; uninstall or rename one"
                        )
                    owners[recipe.name] = plugin
                    found.append(recipe)
        return found

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
        return [p.describe(components[id(p)], conflicts[id(p)]) for p in self._plugins]

    # --- loading ---
    @property
    def _plugins(self) -> list[Plugin]:
        with self._lock:
            if self._loading:
                raise PluginError(
                    f"plugins are still being loaded, and {self._loading} looks one up while it is imported; "
                    f"do that inside a function"
                )
            if self._loaded is None:
                try:
                    self._loaded = self._load_all()
                finally:
                    self._loading = ""
            return self._loaded

    def _load_all(self) -> list[Plugin]:
        plugins: list[Plugin] = []
        points = importlib.metadata.entry_points(group=hookspecs.GROUP) if self._use_entry_points else ()
        for point in sorted(points, key=lambda p: (p.value != CORE_MODULE, p.name, p.value)):
            if any(plugin.module == point.value for plugin in plugins):
                continue  # two entry points that lead to one module are one plugin
            requirements = (point.dist.requires or ()) if point.dist is not None else ()
            plugins.append(self._load(Plugin.from_entry_point(point), point.load, requirements))
        if not any(plugin.module == CORE_MODULE for plugin in plugins):  # a source tree without metadata
            core = Plugin("core", CORE_DIST, __version__, CORE_MODULE)
            plugins.insert(0, self._load(core, lambda: importlib.import_module(CORE_MODULE)))
        for extra in self._extra:
            if not any(plugin.implementation is extra for plugin in plugins):
                plugins.append(self._load(Plugin.from_object(extra), _constant(extra)))
        return plugins

    def _load(self, plugin: Plugin, load: Callable[[], Any], requirements: Iterable[str] = ()) -> Plugin:
        self._loading = plugin.owner
        try:
            plugin.incompatible = refusal_by_requirements(requirements)
            if not plugin.incompatible:
                implementation = load()
                plugin.incompatible = refusal_by_declaration(getattr(implementation, "FADE_CORE", ""))
            if not plugin.incompatible:
                plugin.implementation = implementation
                self._register(plugin)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (the host survives whatever a plugin raises)
            plugin.fail("import", error)
        return plugin

    def _register(self, plugin: Plugin) -> None:
        known = {name for name in vars(hookspecs) if name.startswith("fade_")}
        hooks_known = f"hooks: {', '.join(sorted(known))}"
        try:
            self._manager.register(plugin.implementation, name=f"{plugin.owner} as {plugin.name}")
            hooks = sorted(caller.name for caller in self._manager.get_hookcallers(plugin.implementation) or [])
            unknown = [name for name in hooks if name not in known]
            if unknown:
                raise PluginError(f"there is no hook {unknown[0]!r}{did_you_mean(unknown[0], known)} ({hooks_known})")
            if not hooks:
                raise PluginError(f"nothing in it is decorated with @hookimpl ({hooks_known})")
        except Exception as error:  # noqa: BLE001 (as above)
            plugin.fail("registration", error)
            if self._manager.is_registered(plugin.implementation):
                self._manager.unregister(plugin.implementation)
            return
        plugin.hooks = tuple(hooks)

    def _call(self, plugin: Plugin, hook: str, **arguments: Any) -> list[Any]:
        others = [p.implementation for p in self._plugins if p is not plugin and p.implementation is not None]
        try:
            return list(self._manager.subset_hook_caller(hook, others)(**arguments))
        except (Exception, SystemExit) as error:  # noqa: BLE001 (the host survives whatever a plugin raises)
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

    def _take(self, group: Group, plugin: Plugin, answer: Any, found: dict[str, list[_Entry]]) -> None:
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
        except Exception as error:  # noqa: BLE001 (as above)
            plugin.fail(hook, error)

    def _unknown(self, group: Group, name: str) -> str:
        op, _, short = name.rpartition(":") if group == "kernels" else ("", "", name)
        known = sorted(self.kernels(op)) if op else self.names(group)
        where = f" for op {op!r}" if op else ""
        message = f"unknown {_SINGULAR[group]} {shown(short)}{where}{did_you_mean(short, known)}"
        message += f" (known: {', '.join(known) or 'none'})"
        broken = [plugin for plugin in self._plugins if plugin.trouble]
        owner = _FIRST_PARTY.get(group, {}).get(short)
        culprits = [plugin for plugin in broken if owner is not None and canonicalize_name(plugin.dist) == owner]
        for plugin in culprits:
            message += f"; {plugin.owner} would provide it, but does not work here: {plugin.trouble}"
        if owner is not None and not culprits:
            message += f"; {owner} provides it: pip install {owner}"
        if owner is None and broken:
            names = ", ".join(plugin.dist for plugin in broken)
            message += f"; installed but not working, which `fade plugins` explains: {names}"
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


def _constant(value: Any) -> Callable[[], Any]:
    return lambda: value


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
    if group == "presets":
        if not isinstance(component, Preset) or not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", component.name):
            raise PluginError(
                f"fade_presets takes Preset objects with a name of small letters, digits and dashes; found {component!r}"
            )
        return (component.name,)
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
