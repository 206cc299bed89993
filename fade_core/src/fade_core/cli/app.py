"""The ``fade`` app: one module a command, plugins' commands beside them, errors as one line."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from fade_core._version import __version__
from fade_core.cli import bench, check, config, demo, evaluate, generate, inspect, plugins
from fade_core.cli.console import errors, out
from fade_core.errors import FadeError

FAILED = 2
"""Exit code of a ``FadeError``."""


OPEN_GROUPS = ("bench",)
"""Groups that plugins may add commands to, by offering a group of that name."""


class FadeGroup(TyperGroup):
    """Shows a ``FadeError`` as one clear message instead of a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except FadeError as error:
            errors.print(f"[bold red]error:[/] {_escaped(str(error))}", soft_wrap=True)
            raise typer.Exit(FAILED) from error


def build_app() -> typer.Typer:
    """The app with every built-in command and those of installed plugins."""
    app = typer.Typer(
        name="fade",
        cls=FadeGroup,
        help="FADE: a compressed KV cache for transformers. Start with [bold]fade demo[/].",
        rich_markup_mode="rich",
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
    )

    app.callback()(_root)

    app.command("demo")(demo.demo)
    app.command("generate")(generate.generate)
    app.command("plugins")(plugins.plugins)
    app.add_typer(config.app, name="config")
    app.add_typer(evaluate.app, name="eval")
    app.add_typer(bench.group(), name="bench")
    app.command("inspect")(inspect.inspect)
    app.command("check")(check.check)
    _add_plugin_commands(app)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        out.print(f"fade-core {__version__}", highlight=False)
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command; ``_version`` has acted on the only one."""


def _add_plugin_commands(app: typer.Typer) -> None:
    """Take over the plugins' commands that work; the others are named and left out."""
    from fade_core.plugins import default_registry

    offered = typer.Typer()
    default_registry().add_commands(offered)
    for info in [*offered.registered_groups]:
        host = next((g.typer_instance for g in app.registered_groups if _name(g) == _name(info)), None)
        if _name(info) in OPEN_GROUPS and host is not None and info.typer_instance is not None:
            offered.registered_groups.remove(info)
            _take(host, info.typer_instance)
    _take(app, offered)


def _take(app: typer.Typer, offered: typer.Typer) -> None:
    """Take over the commands and groups of ``offered`` that work and whose names are free."""
    taken = {_name(info) for info in [*app.registered_commands, *app.registered_groups]}
    for info, kind in [
        *((info, "registered_commands") for info in offered.registered_commands),
        *((info, "registered_groups") for info in offered.registered_groups),
    ]:
        trouble = _trouble(info, kind, taken)
        if trouble:
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


def _name(info: Any) -> str:
    callback = getattr(info, "callback", None)
    name = info.name if isinstance(info.name, str) else None
    if name is None and getattr(info, "typer_instance", None) is not None:
        name = info.typer_instance.info.name
    return name or (callback.__name__.replace("_", "-") if callback is not None else "?")


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
