"""What is read from a model's config, and what is refused."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from fade_core.errors import ConfigError, UnsupportedModelError
from fade_core.interfaces import RopeScheme
from fade_rope import NoRope, scheme_from_config
from fade_rope.facts import axes
from fade_rope.reader import read_spec
from fade_rope.schemes import FAMILIES


def config(**fields: Any) -> SimpleNamespace:
    return SimpleNamespace(**{"model_type": "llama", "head_dim": 16, "max_position_embeddings": 64, **fields})


def rope(rope_type: str, **parameters: Any) -> SimpleNamespace:
    return config(rope_parameters={"rope_type": rope_type, "rope_theta": 10_000.0, **parameters})


def test_an_unknown_type_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="'xpos' is not known; known are") as caught:
        scheme_from_config(rope("xpos"))
    for kind in FAMILIES:
        assert kind in str(caught.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (rope("linear"), "'linear' needs 'factor'"),
        (rope("dynamic"), "'dynamic' needs 'factor'"),
        (rope("dynamic", factor=2.0, partial_rotary_factor=0.125), "needs at least 4 rotated channels; found 2"),
        (rope("ntk", factor=2.0, partial_rotary_factor=0.125), "needs at least 4 rotated channels; found 2"),
        (rope("linear", factor=0), "factor=0 must be a number above 0"),
        (rope("linear", factor="4"), "factor='4' must be a number above 0"),
        (rope("linear", factor=True), "factor=True must be a number above 0"),
        (rope("llama3", factor=8.0), "'llama3' needs 'low_freq_factor'"),
        (rope("longrope", factor=2.0, short_factor=[1.0] * 7), "short_factor must be 8 numbers.*found 7"),
        (rope("longrope", factor=2.0), "short_factor must be 8 numbers.*found None"),
        (config(rope_parameters=["default"]), "rope_parameters of model type 'llama' must be a dict; found list"),
        (config(head_dim=None, rope_theta=1e4), "neither head_dim nor hidden_size"),
        (config(rope_parameters={"partial_rotary_factor": 2.0}), "would turn 32 of 16 channels"),
        (rope("default", mrope_section=[2, 2, 2], model="x"), None),
    ],
)
def test_missing_and_impossible_parameters_are_named(given: Any, says: str | None) -> None:
    if says is None:
        given.model_type = "qwen2_vl_text"
        says = "divides 6 frequencies.* has 8"
    with pytest.raises(ConfigError, match=says):
        scheme_from_config(given)


def test_long_factors_are_checked_before_they_are_needed() -> None:
    with pytest.raises(ConfigError, match=r"long_factor must be 8 numbers.*found 3"):
        scheme_from_config(rope("longrope", factor=2.0, short_factor=[1.0] * 8, long_factor=[1.0] * 3))


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "minicpm3", "deepseek_v4"])
def test_latent_attention_is_refused_by_name(kind: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{kind}' caches latents"):
        scheme_from_config(transformers.AutoConfig.for_model(kind))


def test_phimoe_is_refused_by_name() -> None:
    given = rope("longrope", long_mscale=1.2, short_mscale=1.1)
    with pytest.raises(ConfigError, match="PhiMoE"):
        scheme_from_config(given)


@pytest.mark.parametrize("layer", [-4, 3, 100])
def test_a_layer_that_does_not_exist(layer: int) -> None:
    with pytest.raises(ConfigError, match=f"layer_idx={layer} does not exist: model type 'llama' has 3 layers"):
        scheme_from_config(config(num_hidden_layers=3, rope_theta=1e4), layer)


def test_layers_of_gemma_4() -> None:
    types = ["sliding_attention"] * 5 + ["full_attention"]
    given = transformers.Gemma4TextConfig(num_hidden_layers=6, head_dim=16, global_head_dim=32, layer_types=types)
    kinds = [scheme_from_config(given, i).kind for i in range(6)]
    assert kinds == ["default"] * 5 + ["proportional"]
    assert [scheme_from_config(given, i).head_dim for i in (0, 5, -1, None)] == [16, 32, 32, 32]
    assert scheme_from_config(given).kind == "proportional"
    assert scheme_from_config(given, 0).spec.theta == 1e4
    assert scheme_from_config(given, 5).spec.theta == 1e6
    turning = scheme_from_config(given, 5).inv_freq
    assert (turning[:4] > 0).all()
    assert (turning[4:] == 0).all()


def test_gemma_4_before_configs_a_layer() -> None:
    given = transformers.Gemma4TextConfig(num_hidden_layers=6, head_dim=16, global_head_dim=32)
    older = SimpleNamespace(
        model_type="gemma4_text",
        head_dim=16,
        global_head_dim=32,
        num_hidden_layers=6,
        layer_types=given.layer_types,
        rope_parameters=given.rope_parameters,
        max_position_embeddings=64,
    )
    assert [scheme_from_config(older, i).head_dim for i in (0, 5)] == [16, 32]


def test_a_layer_type_without_parameters() -> None:
    given = config(layer_types=["full_attention", "chunked_attention"], num_hidden_layers=2)
    given.rope_parameters = {"full_attention": {"rope_type": "default", "rope_theta": 1e4}, "sliding_attention": None}
    with pytest.raises(ConfigError, match="rope_parameters for full_attention, none for 'chunked_attention'"):
        scheme_from_config(given, 1)
    given.layer_types[1] = "sliding_attention"
    assert isinstance(scheme_from_config(given, 1), NoRope)
    assert scheme_from_config(given).kind == "default"


@pytest.mark.parametrize("name", ["Qwen2VLConfig", "Qwen2_5_VLConfig", "Qwen3VLConfig", "Gemma3Config", "Glm4vConfig"])
def test_a_composite_config_means_its_text_part(name: str) -> None:
    whole = getattr(transformers, name)()
    assert read_spec(whole, 0) == read_spec(whole.text_config, 0)
    assert read_spec(whole, 0) is not None


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
        ),
        (
            {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_scaling": None},
            {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        ),
        (
            {
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                "rope_scaling": {"type": "su", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
            },
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
                "short_factor": [1.0] * 8,
                "long_factor": [2.0] * 8,
            },
        ),
    ],
)
def test_older_spellings_mean_the_same(older: dict[str, Any], newer: dict[str, Any], seed: int) -> None:
    x, positions = torch.randn(1, 2, 9, 16), torch.randint(0, 500, (9,))
    old, new = scheme_from_config(config(**older)), scheme_from_config(config(rope_parameters=newer))
    assert old.kind == new.kind
    assert torch.equal(old.rotate(x, positions), new.rotate(x, positions))


def test_sections_of_the_axes() -> None:
    assert axes("qwen2_vl_text", [2, 3, 3], 8) == (0, 0, 1, 1, 1, 2, 2, 2)
    assert axes("qwen3_vl_text", [4, 2, 2], 8) == (0, 1, 2, 0, 1, 2, 0, 0)
    assert axes("llama", [2, 3, 3], 8) == ()
    assert axes("qwen2_vl_text", [], 8) == ()


def test_schemes_say_what_they_are() -> None:
    text = repr(scheme_from_config(transformers.Qwen3VLTextConfig(head_dim=16, rope_parameters={"rope_theta": 5e6})))
    assert re.search(r"theta=5e\+06, channels=16/16", text)
    assert repr(NoRope()) == "NoRope()"
    assert isinstance(NoRope(), RopeScheme)


def test_importing_the_plugin_does_not_import_transformers() -> None:
    code = "import sys, fade_rope, fade_rope.plugin; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
