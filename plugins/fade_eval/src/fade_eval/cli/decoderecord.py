"""``decode.json``: what ``fade bench decode`` measured, under which settings, and what is missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fade_core.errors import InputError

if TYPE_CHECKING:
    from fade_eval.generating import Comparison

FILE = "decode.json"

Point = tuple[str, int, int]
"""Shape, rows and tokens of the prompt."""


class Record:
    """Comparisons, in a file that is whole whenever the process ends.

    Args:
        settings: everything that a time depends on, as JSON holds it; ``shape``, ``batch``, ``context`` and ``config`` (their
            configurations by name) say what there is to measure.
        folder: of the file; ``None`` for none.

    Raises:
        InputError: if there is a file that cannot be read, or that other settings made.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path | None) -> None:
        self.settings, self.path = dict(settings), None if folder is None else folder / FILE
        self.points: list[Point] = [
            (shape, batch, context)
            for shape in settings["shape"]
            for batch in settings["batch"]
            for context in settings["context"]
        ]
        self.found: dict[Point, Comparison] = {}
        if self.path is not None and self.path.exists():
            self._read(self.path)

    def _read(self, path: Path) -> None:
        from fade_eval.generating import Comparison

        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            found = [Comparison.from_dict(one) for one in held["results"]]
            differing = differences(held["settings"], self.settings)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be gone on from: {type(error).__name__}: {error}. Give another --output-dir, or move that file"
            ) from error
        if differing:
            raise InputError(
                f"{path} was measured with other settings: {'; '.join(differing)}. Give these again to go on, or another "
                f"--output-dir"
            )
        self.found = {(one.shape, one.batch, one.context): one for one in found}

    def missing_at(self, point: Point) -> list[str]:
        """Caches and configurations that are still to be measured at ``point``."""
        from fade_eval.generating import Comparison

        return self.found.get(point, Comparison(*point, self.settings["steps"])).missing(list(self.settings["config"]))

    def missing(self) -> list[str]:
        """Everything that is still to be measured, with the reason where it was left out."""
        lines = []
        for point in self.points:
            shape, batch, context = point
            reasons = self.found[point].left_out if point in self.found else {}
            for name in self.missing_at(point):
                reason = f" (left out: {reasons[name]})" if name in reasons else ""
                lines.append(f"{shape}, {batch} x {context}: {name}{reason}")
        return lines

    def add(self, found: Comparison) -> None:
        """Take ``found`` in, and write the file."""
        self.found[found.shape, found.batch, found.context] = found
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f"{FILE}.part")
        beside.write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        beside.replace(self.path)  # at once: who reads it never sees half of it

    def to_dict(self) -> dict[str, Any]:
        """What the file holds."""
        results = [self.found[point].to_dict() for point in self.points if point in self.found]
        return {"settings": self.settings, "missing": self.missing(), "results": results}


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What differs between two settings, in words."""
    lines = []
    for name in sorted({*held, *wanted}):
        was, now = held.get(name), wanted.get(name)
        if was == now:
            continue
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            if list(was) != list(now):
                was, now = ", ".join(was), ", ".join(now)
            else:
                lines += [f"{name} {one} means something else now" for one in was if was[one] != now[one]]
                continue
        lines.append(f"{name} was {was} and is {now}")
    return lines
