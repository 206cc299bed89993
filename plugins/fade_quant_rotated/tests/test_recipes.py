"""What this distribution adds to `fade eval quality`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fade_core import FadeConfig, get_quantizer
from fade_core.plugins import Registry, use_registry
from fade_quant_rotated import plugin
from fade_quant_rotated.recipes import BITS, recipes


@pytest.mark.parametrize("head_dim", [64, 80])
def test_recipes_take_the_bits_of_their_names(head_dim: int) -> None:
    with use_registry(Registry([plugin], entry_points=False)):
        for recipe in recipes():
            config = FadeConfig(**recipe.fields)
            keys, values = (
                get_quantizer(head_dim=head_dim, side=side, **quantizer.model_dump(exclude_unset=True)).bits_per_element
                for side, quantizer in (("key", config.keys), ("value", config.values))
            )
            named = [float(number) for number in re.findall(r"[0-9.]+", recipe.name)]
            if config.keys.kind == "self-calibrated":  # bits are everything
                assert named[0] - 0.1 < keys <= named[0]
                assert named[-1] - 0.1 < values <= named[-1]
            else:  # widths of the codes; scales come on top
                assert named[0] < keys <= named[0] + 0.5
                assert named[-1] < values <= named[-1] + 0.5


def test_a_calibration_file_adds_calibrated_recipes(tmp_path: Path) -> None:
    file = str(tmp_path / "calibration.safetensors")
    with use_registry(Registry([plugin], entry_points=False)) as registry:
        without, given = registry.quality_recipes(), registry.quality_recipes(file)
        added = [recipe for recipe in given if recipe not in without]
        assert len(added) == len(BITS) + 1
        for recipe in added:
            config = FadeConfig(**recipe.fields)
            assert config.keys.kind == config.values.kind == "calibrated"
            assert config.keys.file == file
            assert f"{config.keys.bits:g}" in recipe.name
        assert without and [recipe for recipe in given if recipe in without] == without
