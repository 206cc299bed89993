"""What ``fade config list`` says of presets is what the documents say that it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fade_core.interfaces import Preset
from fade_core.plugins import default_registry

ROOT = Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "benchmarks/RESULTS.md",
    "plugins/fade_quant_rotated/README.md",
)


@pytest.mark.parametrize("preset", default_registry().all("presets").values(), ids=lambda preset: preset.name)
def test_figures_of_presets_are_published(preset: Preset) -> None:
    """In a paragraph that names the preset."""
    assert "README.md" in preset.measured
    told = "\n".join(
        paragraph
        for document in DOCUMENTS
        for paragraph in (ROOT / document).read_text(encoding="utf-8").split("\n\n")
        if f"`{preset.name}`" in paragraph
    )
    figures = re.findall(r"\d+\.\d+", f"{preset.speed} {preset.measured}")
    assert figures
    assert [figure for figure in figures if figure not in told] == []
