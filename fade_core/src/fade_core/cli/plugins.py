"""``fade plugins``: what is installed, what it provides, and what does not work here and why."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer
from rich.markup import escape

from fade_core.cli.console import out, print_json, rows, table
from fade_core.cli.options import Device, Json

_COLOURS = {"loaded": "green", "failed": "red", "incompatible": "red", "conflict": "yellow"}


def plugins(
    json: Json = False,
    device: Device = "auto",
    head_dim: Annotated[int, typer.Option(help="Head dimension to ask the kernels about.")] = 128,
) -> None:
    """List plugins with status and reason, and which kernels run on this machine."""
    from fade_core.plugins import default_registry

    default_registry().add_commands(typer.Typer())  # what a plugin's commands raise is part of its status
    found = default_registry().list_plugins()
    kernels = kernel_support(device, head_dim)
    if json:
        print_json({"plugins": [dataclasses.asdict(plugin) for plugin in found], "kernels": kernels})
        return
    made = table("plugins", "plugin", "version", "status", "provides")
    for plugin in found:
        provides = "\n".join(f"{group}: {', '.join(names)}" for group, names in plugin.components.items())
        if "fade_commands" in plugin.hooks:
            provides += "\ncommands"
        status = f"[{_COLOURS[plugin.status]}]{plugin.status}[/]"
        if plugin.reason:
            status += f"\n{escape(plugin.reason)}"
        made.add_row(escape(plugin.dist), plugin.version, status, escape(provides.strip()))
    out.print(made)
    shown = [(k["op"], k["name"], "yes" if k["supported"] else "no", k["reason"]) for k in kernels]
    out.print(rows(table("kernels on this machine", "op", "implementation", "runs", "why not"), shown))


def kernel_support(device: str = "auto", head_dim: int = 128) -> list[dict[str, Any]]:
    """For every kernel that is installed, whether it would run 4-bit keys of the safe preset here."""
    import torch

    from fade_core.builtin.quantizers.uniform import UniformConfig
    from fade_core.config.kernel_selection import OPS
    from fade_core.interfaces import QuantizerContext
    from fade_core.plugins import default_registry

    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    packed = UniformConfig(bits=4, axis="channel").build(QuantizerContext(head_dim, "key")).format
    found = []
    for op in OPS:
        for name, kernel in default_registry().kernels(op).items():
            support = kernel.supports(packed, head_dim, where, dtype)
            found.append({"op": op, "name": name, "supported": bool(support), "reason": support.reason})
    return found
