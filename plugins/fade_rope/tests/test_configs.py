"""The schemes as a FADE config names them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fade_core.errors import ConfigError
from fade_rope import NoRope, configs, plugin
from fade_rope.schemes import FAMILIES
from fade_rope.verification import relative_error

MODEL: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "ntk": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0 + i for i in range(8)],
        "long_factor": [2.0 + i for i in range(8)],
        "original_max_position_embeddings": 64,
    },
    "proportional": {"partial_rotary_factor": 0.5},
}
OTHER: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"rope_theta": 2e5}) for kind in MODEL),
    ("linear", {"factor": 3.0}),
    ("ntk", {"factor": 3.0}),
    ("dynamic", {"factor": 3.0}),
    ("yarn", {"factor": 8.0}),
    ("yarn", {"original_max_position_embeddings": 32}),
    ("yarn", {"attention_factor": 2.0}),
    ("yarn", {"beta_fast": 2.0}),
    ("yarn", {"beta_slow": 2.0}),
    ("yarn", {"mscale": 1.0, "mscale_all_dim": 0.5}),
    ("yarn", {"truncate": False}),
    ("llama3", {"factor": 4.0}),
    ("llama3", {"original_max_position_embeddings": 64}),
    ("llama3", {"low_freq_factor": 0.5}),
    ("llama3", {"high_freq_factor": 8.0}),
    ("longrope", {"short_factor": [9.0] * 8}),
    ("longrope", {"long_factor": [9.0] * 8}),
    ("longrope", {"original_max_position_embeddings": 10}),
    ("longrope", {"factor": 2.0}),
    ("longrope", {"attention_factor": 2.0}),
    ("proportional", {"factor": 2.0}),
    ("proportional", {"partial_rotary_factor": 0.75}),
]
BY_KIND = {c.model_fields["kind"].default: c for c in plugin.fade_rope_schemes()}


def model_config(kind: str, **fields: Any) -> SimpleNamespace:
    parameters = {"rope_type": kind, "rope_theta": 10_000.0, **MODEL[kind]}
    return SimpleNamespace(
        **{"model_type": "llama", "head_dim": 16, "max_position_embeddings": 64, "rope_parameters": parameters} | fields
    )


def test_every_scheme_is_registered_once() -> None:
    assert len(BY_KIND) == len(plugin.fade_rope_schemes())
    assert set(BY_KIND) == {*FAMILIES, "auto", "none", "mrope"}


@pytest.mark.parametrize("kind", MODEL)
def test_auto_and_the_name_itself_give_the_same(kind: str, seed: int) -> None:
    x, positions = torch.randn(1, 2, 6, 16), torch.randint(0, 200, (6,))
    named, auto = (BY_KIND[k](kind=k).build(model_config(kind)) for k in (kind, "auto"))
    assert named.kind == auto.kind == kind
    assert torch.equal(named.rotate(x, positions), auto.rotate(x, positions))


@pytest.mark.parametrize(("kind", "fields"), OTHER)
def test_every_field_counts(kind: str, fields: dict[str, Any], seed: int) -> None:
    x = torch.randn(1, 2, 40, 16)
    was, now = (BY_KIND[kind](kind=kind, **f).build(model_config(kind)) for f in ({}, fields))
    near, far = torch.arange(20).repeat(2), torch.arange(100, 140)
    assert max(relative_error(now.rotate(x, p), was.rotate(x, p)) for p in (near, far)) > 1e-3


def test_every_field_is_tested() -> None:
    tested = {(kind, name) for kind, fields in OTHER for name in fields}
    declared = {
        (kind, name) for kind, c in BY_KIND.items() for name in c.model_fields if name != "kind" and kind != "mrope"
    }
    assert declared == tested


@pytest.mark.parametrize("kind", MODEL)
def test_another_scheme_than_the_models_is_refused(kind: str) -> None:
    other = "linear" if kind != "linear" else "yarn"
    with pytest.raises(ConfigError, match=f"kind='{other}' contradicts the model's config, which names RoPE '{kind}'"):
        BY_KIND[other]().build(model_config(kind))
    with pytest.raises(ConfigError, match=f"kind='none' contradicts the model's config, which names RoPE '{kind}'"):
        configs.NoRopeConfig().build(model_config(kind))


def test_models_without_rotation() -> None:
    alibi = model_config("default", alibi=True)
    assert isinstance(configs.NoRopeConfig().build(alibi), NoRope)
    assert isinstance(configs.AutoRopeConfig().build(alibi), NoRope)
    with pytest.raises(ConfigError, match="names no rotary embedding"):
        configs.DefaultRopeConfig().build(alibi)


def test_mrope_stands_over_other_scalings() -> None:
    given = model_config("yarn", model_type="qwen2_5_vl_text")
    given.rope_parameters["mrope_section"] = [2, 3, 3]
    wrapped, named = configs.MRopeConfig().build(given), configs.YarnRopeConfig().build(given)
    assert wrapped.kind == named.kind == "mrope"
    assert wrapped.inner.kind == "yarn"
    with pytest.raises(ConfigError, match="kind='mrope' contradicts"):
        configs.MRopeConfig().build(model_config("yarn"))


def test_layers_are_built_one_by_one() -> None:
    given = model_config("default", layer_types=["sliding_attention", "full_attention"], num_hidden_layers=2)
    given.rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    }
    build = configs.AutoRopeConfig().build
    assert [build(given, i).kind for i in (0, 1, None)] == ["default", "linear", "linear"]


@pytest.mark.parametrize(
    ("kind", "fields", "says"),
    [
        ("linear", {"factor": -1.0}, "factor"),
        ("linear", {"factr": 2.0}, "factr"),
        ("linear", {"factor": "2"}, "factor"),
        ("yarn", {"original_max_position_embeddings": 64.5}, "original_max_position_embeddings"),
        ("longrope", {"short_factor": []}, "short_factor"),
        ("longrope", {"long_factor": [1.0, 0.0]}, "long_factor"),
        ("yarn", {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
    ],
)
def test_bad_fields_are_named(kind: str, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        BY_KIND[kind](kind=kind, **fields)
