"""The ``fade`` app: a command is imported when it is asked for, plugins' commands beside the core's, errors as one line."""

from __future__ import annotations

import copy
import importlib
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command, get_group

from fade_core._version import __version__
from fade_core.errors import FadeError, MissingDistributionError

FAILED = 2
"""Exit code of a ``FadeError``."""

COMMANDS = {
    "generate": "fade_core.cli.generate:generate",
    "plugins": "fade_core.cli.plugins:plugins",
    "config": "fade_core.cli.config:app",
    "inspect": "fade_core.cli.inspect:inspect",
    "check": "fade_core.cli.check:check",
}
"""The core's commands, and the function or the app of each. None of these modules imports torch at its top."""

OPEN_GROUPS = ("bench", "eval")
"""Groups that several plugins may add commands to, by offering a group of that name."""

_FIRST_PARTY = {
    **dict.fromkeys(("bench", "demo", "eval"), "fade-eval"),
    **dict.fromkeys(("calibrate", "train-codebook"), "fade-quant-rotated"),
    "check-kernels": "fade-kernels-triton",
    "train-policy": "fade-policy-learned",
}
"""Commands that FADE's own plugins bring, for the message that says what to install."""


class FadeGroup(TyperGroup):
    """Imports a command of the core when it is asked for, and plugins when the core has none of that name.

    A ``FadeError`` is shown as one clear message instead of a traceback.
    """

    _plugins_asked = False

    def list_commands(self, ctx: Any) -> list[str]:
        for name in COMMANDS:
            self.get_command(ctx, name)
        self._ask_plugins()
        return super().list_commands(ctx)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            self.commands[cmd_name] = _imported(cmd_name)
        if cmd_name not in self.commands:
            self.list_commands(ctx)  # all of them, which a suggestion for a misspelt name is taken from
        if cmd_name not in self.commands and cmd_name in _FIRST_PARTY and not ctx.resilient_parsing:
            raise MissingDistributionError(_missing(cmd_name))
        return super().get_command(ctx, cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FadeError as error:
            from fade_core.cli.console import errors

            errors.print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
            raise typer.Exit(FAILED) from error

    def _ask_plugins(self) -> None:
        if not self._plugins_asked:
            self._plugins_asked = True
            self.commands.update(get_group(_plugin_commands()).commands)


def build_app() -> typer.Typer:
    """The app with every built-in command and those of installed plugins; none is imported yet."""
    app = typer.Typer(
        name="fade",
        cls=FadeGroup,
        help="FADE: a compressed KV cache for transformers. Start with [bold]fade demo[/].",
        rich_markup_mode="rich",
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
    )
    app.callback()(_root)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fade-core {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command; ``_version`` has acted on the only one."""


def _imported(name: str) -> Any:
    """The core's command ``name``."""
    module, _, attribute = COMMANDS[name].partition(":")
    found = getattr(importlib.import_module(module), attribute)
    app = typer.Typer()
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=name)
    else:
        app.command(name)(found)
    return get_group(app).commands[name]


def _plugin_commands() -> typer.Typer:
    """An app of the plugins' commands that work; the others are named and left out."""
    from fade_core.plugins import default_registry

    app, offered = typer.Typer(), typer.Typer()
    default_registry().add_commands(offered)
    for name in OPEN_GROUPS:
        _join(offered, name)
    _take(app, offered, set(COMMANDS))
    return app


def _join(offered: typer.Typer, name: str) -> None:
    """Make one group of those called ``name``: the first that runs without a sub-command, or the first, takes the rest."""
    named = [info for info in offered.registered_groups if _name(info) == name]
    groups = [(info, info.typer_instance) for info in named if info.typer_instance is not None]
    if len(groups) < 2:
        return
    (first, chosen), *others = sorted(groups, key=lambda group: group[1].registered_callback is None)
    host = copy.copy(chosen)  # the plugin's own object stays as it is
    host.registered_commands, host.registered_groups = [*host.registered_commands], [*host.registered_groups]
    first.typer_instance = host
    for info, group in others:
        offered.registered_groups.remove(info)
        _take(host, group)


def _take(app: typer.Typer, offered: typer.Typer, taken: set[str] | None = None) -> None:
    """Take over the commands and groups of ``offered`` that work and whose names are free."""
    taken = {_name(info) for info in [*app.registered_commands, *app.registered_groups]} | (taken or set())
    for info, kind in [
        *((info, "registered_commands") for info in offered.registered_commands),
        *((info, "registered_groups") for info in offered.registered_groups),
    ]:
        trouble = _trouble(info, kind, taken)
        if trouble:
            from fade_core.cli.console import errors

            errors.print(f"[yellow]warning:[/] plugin command {_name(info)!r} is left out: {_escaped(trouble)}")
            continue
        taken.add(_name(info))
        getattr(app, kind).append(info)


def _trouble(info: Any, kind: str, taken: set[str]) -> str:
    """Why a command cannot be offered, or ""."""
    if _name(info) in taken:
        return "another command has that name"
    alone = typer.Typer()
    getattr(alone, kind).append(info)
    try:
        get_command(alone)
    except Exception as error:  # noqa: BLE001 (whatever a plugin's signature raises must not take the others down)
        return f"{type(error).__name__}: {error}"
    return ""


def _missing(name: str) -> str:
    """What to say of a command that one of FADE's own plugins would bring."""
    from packaging.utils import canonicalize_name

    from fade_core.plugins import list_plugins

    dist = _FIRST_PARTY[name]
    for plugin in list_plugins():
        if canonicalize_name(plugin.dist) == dist and plugin.reason:
            return f"{dist} brings `fade {name}`, but does not work here: {plugin.reason}"
    return f"{dist} brings `fade {name}`: pip install {dist}"


def _name(info: Any) -> str:
    callback = getattr(info, "callback", None)
    name = info.name if isinstance(info.name, str) else None
    if name is None and getattr(info, "typer_instance", None) is not None:
        name = info.typer_instance.info.name
    return name or (callback.__name__.replace("_", "-") if callback is not None else "?")


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
