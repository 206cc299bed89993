"""Named ways to compress a cache, to be measured beside the others."""

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
