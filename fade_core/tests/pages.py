"""Reading the documentation: fenced blocks, and the names that tables list."""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def first_column(text: str, header: str) -> list[str]:
    """Names in backticks in the first column of the tables that start with ``header``."""
    names: list[str] = []
    for table in re.findall(rf"^\| {header} \|.*?\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE):
        for line in table.splitlines():
            names += re.findall(r"`(\w+)", line.split("|")[1])
    return names
