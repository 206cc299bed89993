"""Named ways to compress a cache: to be taken, or to be measured beside the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A named way to compress a cache, which ``fade eval quality`` measures beside the others.

    Attributes:
        name: what tables and plots call it; unique over all plugins.
        fields: fields of a ``FadeConfig``; sinks and window are the command's unless they are among them.
        note: where it comes from (a paper, a preset), in a few words.
    """

    name: str
    fields: Mapping[str, Any]
    note: str = ""


@dataclass(frozen=True)
class Preset:
    """A configuration with a name of its own: ``FadeConfig.preset("NAME")``, ``--config NAME``.

    Attributes:
        name: unique over all plugins, in small letters and dashes.
        fields: fields of a ``FadeConfig``.
        summary: what it trades, in a line.
        speed: what reads it quickly: the kernels that were timed with it, and how fast.
        measured: where its accuracy and speed were measured: model, machine, document.
    """

    name: str
    fields: Mapping[str, Any]
    summary: str
    speed: str = ""
    measured: str = ""
