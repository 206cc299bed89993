"""`fade eval sensitivity`: a layer that is made sensitive is found, and more bits for it help as is said."""

from __future__ import annotations

import csv
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import run
from tiny import byte_tokenizer, fresh_seed, tiny_llama
from torch import Tensor

from fade_core import FadeConfig, create_tiered_cache
from fade_core.errors import ConfigError, InputError
from fade_eval import divergence
from fade_eval.finer import as_toml, finer_layers
from fade_eval.sensitivity import alone, sensitivity

SMALL: dict[str, Any] = {"n_sink": 2, "recent_window": 16, "tile": 16}
CONFIG = FadeConfig(**SMALL, keys={"kind": "uniform", "bits": 8, "axis": "channel"})
SIZES: dict[str, Any] = {"prompt_tokens": 70, "steps": 10}
LAYERS = 4
SENSITIVE = 2
OUTLIER = 100


def sensitive_llama(layer: int = SENSITIVE) -> Any:
    """A model in which one layer's values have an outlier channel, which its output projection scales back.

    The model computes what it did before; scales that a whole token shares must now span the outlier.
    """
    model = tiny_llama(layers=LAYERS)
    attention = model.model.layers[layer].self_attn
    with torch.no_grad():
        for head in range(2):
            attention.v_proj.weight[head * 16] *= OUTLIER
        for head in range(4):
            attention.o_proj.weight[:, head * 16] /= OUTLIER
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return sensitive_llama()


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(fresh_seed())
    return torch.randint(0, 256, (3, 81))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_sensitive_layer_is_ranked_first(model: Any, ids: Tensor, batch_size: int) -> None:
    told: list[tuple[int, int]] = []
    found = sensitivity(
        model, CONFIG, ids, **SIZES, batch_size=batch_size, progress=lambda done, total: told.append((done, total))
    )
    assert [layer.layer for layer in found.layers] == list(range(LAYERS))
    worst, second, *_ = found.ranked
    assert worst.layer == SENSITIVE
    assert worst.kl_mean > 1.5 * second.kl_mean
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)
    assert worst.share == pytest.approx(worst.kl_mean / found.sum)
    assert found.together == divergence(model, ids, CONFIG, **SIZES, batch_size=batch_size)
    assert told[-1] == (3 * 10 * (LAYERS + 2),) * 2
    json.dumps(found.to_dict())


@pytest.mark.slow
def test_without_the_outlier_that_layer_costs_a_fraction(model: Any, ids: Tensor) -> None:
    spoilt = sensitivity(model, CONFIG, ids, **SIZES, batch_size=3).layers
    plain = sensitivity(tiny_llama(layers=LAYERS), CONFIG, ids, **SIZES, batch_size=3).layers
    assert plain[SENSITIVE].kl_mean < spoilt[SENSITIVE].kl_mean / 3
    for layer in set(range(LAYERS)) - {SENSITIVE}:
        assert plain[layer].kl_mean == pytest.approx(spoilt[layer].kl_mean, rel=0.05, abs=1e-5), (
            "the models compute the same"
        )


def test_one_layer_is_compressed_and_the_others_are_exact(model: Any, ids: Tensor) -> None:
    """Against a cache in which the other layers' tokens never leave the window."""
    found = sensitivity(model, CONFIG, ids, **SIZES, batch_size=3)
    for layer in (0, LAYERS - 1):
        wide = {str(other): {"recent_window": 512} for other in range(LAYERS) if other != layer}
        alone_in_window = divergence(model, ids, CONFIG.with_overrides(layers=wide), **SIZES, batch_size=3)
        assert found.layers[layer].kl_mean == pytest.approx(alone_in_window.kl_mean, rel=1e-2, abs=1e-6)
    exact = divergence(model, ids, FadeConfig(**SMALL, ladder=[{"tier": "fp16"}]), **SIZES, batch_size=3)
    assert exact.kl_mean < 1e-6


def test_each_layer_keeps_its_own_override_and_loses_the_budget() -> None:
    two = {"kind": "uniform", "bits": 2}
    config = FadeConfig(
        **SMALL,
        policy={"kind": "h2o", "budget": 0.5, "schedule": {"kind": "pyramid"}},
        layers={"1:3": {"keys": two}, "-1": {"n_sink": 0}},
    )
    middle = alone(config, 1, 4)
    assert middle.policy.kind == "h2o"
    assert not middle.evicts
    assert [middle.for_layer(layer, 4).resolved_ladder()[0].name for layer in range(4)] == [
        "fp16",
        "k2v4",
        "fp16",
        "fp16",
    ]
    last = alone(config, 3, 4)
    assert (last.for_layer(3, 4).n_sink, last.for_layer(3, 4).resolved_ladder()[0].name) == (0, "int4")
    assert alone(FadeConfig(), 0, 1).layers == {}
    with pytest.raises(ConfigError, match="layer 4 does not exist"):
        alone(config, 4, 4)


def test_bad_numbers_are_explained(model: Any, ids: Tensor) -> None:
    with pytest.raises(InputError, match="steps must be"):
        sensitivity(model, FadeConfig(**SMALL), ids, prompt_tokens=70, steps=0)


# --- more bits ---


def uniform(bits: int, **fields: Any) -> dict[str, Any]:
    return {"kind": "uniform", "bits": bits, **fields}


@pytest.mark.parametrize(
    ("fields", "keys", "values"),
    [
        ({}, uniform(8, axis="channel"), uniform(8, axis="token")),
        ({"keys": uniform(2), "values": uniform(3, group=8)}, uniform(4), uniform(8, group=8)),
        (
            {"keys": {"kind": "kivi", "bits": 2, "group": 8}, "values": {"kind": "kivi", "bits": 4, "group": 8}},
            {"kind": "kivi", "bits": 4, "group": 8},
            uniform(8, axis="token"),
        ),
        ({"keys": uniform(8)}, None, uniform(8, axis="token")),
        ({"keys": uniform(16), "values": uniform(8)}, None, None),
    ],
)
def test_a_finer_layer_has_about_twice_the_bits(
    model: Any, fields: dict[str, Any], keys: dict[str, Any] | None, values: dict[str, Any] | None
) -> None:
    config = FadeConfig(**SMALL, **fields)
    found = finer_layers(model, config, [1])
    wanted = {name: quantizer for name, quantizer in (("keys", keys), ("values", values)) if quantizer}
    assert found == ({"1": wanted} if wanted else {})


def test_overrides_that_are_there_stay(model: Any) -> None:
    config = FadeConfig(**SMALL, layers={":2": {"n_sink": 1}, "-2:": {"values": uniform(2)}})
    found = finer_layers(model, config, [3])
    assert found == {
        ":2": {"n_sink": 1},
        "2": config.to_dict()["layers"]["-2:"],
        "3": {"keys": uniform(8, axis="channel"), "values": uniform(4)},
    }
    finer = config.with_overrides(layers=found)
    for layer in range(3):
        assert finer.for_layer(layer, LAYERS) == config.for_layer(layer, LAYERS)


@pytest.mark.parametrize(
    ("capacities", "wanted"), [((32, "rest"), "rest"), ((32, 64), 96), ((0.5, 0.75), 1.0), ((32, 0.25), "rest")]
)
def test_in_a_ladder_the_finest_rung_takes_everything(model: Any, capacities: Any, wanted: Any) -> None:
    ladder = [{"tier": "int4", "capacity": capacities[0]}, {"tier": "int2", "capacity": capacities[1]}]
    (override,) = finer_layers(model, FadeConfig(**SMALL, ladder=ladder), [0]).values()
    assert override == {"ladder": [{"tier": "int4", "capacity": wanted}]}


def test_the_lines_are_a_configuration_file(model: Any, tmp_path: Path) -> None:
    config = FadeConfig(**SMALL, values={"kind": "kivi", "group": 8}, layers={"0": {"ladder": [{"tier": "int2"}]}})
    overrides = finer_layers(model, config, [0, 2])
    text = as_toml(overrides)
    assert '[layers."2"]' in text
    assert tomllib.loads(text)["layers"] == overrides
    (tmp_path / "finer.toml").write_text(text)
    finer = FadeConfig.from_file(tmp_path / "finer.toml")
    with create_tiered_cache(model, config.with_overrides(layers=finer.layers)) as cache:
        bits = [layer.plan.ladder.tiers[0].keys.bits for layer in cache.tiered]
    assert bits == [4, 4, 8, 4]


# --- the command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    folder = tmp_path_factory.mktemp("sensitive")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fields", [{}, {"policy": {"kind": "h2o", "budget": 0.75, "every": 16}}])
def test_the_command_ranks_tries_and_prints_what_to_write(folder: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    CONFIG.with_overrides(**fields).to_file(tmp_path / "small.toml")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 3, encoding="utf-8")
    arguments = (
        *("eval", "sensitivity", "--model", folder, "--config", tmp_path / "small.toml", "--worst", 1),
        *("--text", tmp_path / "text.txt", "--prompt-tokens", 80, "--steps", 8, "--output-dir", tmp_path / "out"),
    )
    shown = run(*arguments)
    assert shown.exit_code == 0, shown.output
    found = json.loads(run(*arguments, "--json").stdout)
    assert found["layers"][0]["layer"] == SENSITIVE
    assert found["finer"]["toml"] in shown.stdout
    assert list(tomllib.loads(found["finer"]["toml"])["layers"]) == [str(SENSITIVE)]
    before, after = found["finer"]["before"], found["finer"]["after"]
    assert after["kl_mean"] < before["kl_mean"] / (1 if fields else 1.5)  # evicting costs more than bits
    assert after["held"]["cache"] > before["held"]["cache"]
    assert "all together" in shown.stdout
    with (tmp_path / "out" / "sensitivity.csv").open(encoding="utf-8") as file:
        assert [int(line["layer"]) for line in csv.DictReader(file)] == list(range(LAYERS))
    assert (tmp_path / "out" / "sensitivity.png").read_bytes().startswith(b"\x89PNG")


def test_a_prompt_of_which_nothing_is_compressed_is_refused(folder: Path, tmp_path: Path) -> None:
    arguments = ("eval", "sensitivity", "--model", folder, "--texts", 1, "--prompt-tokens", 20, "--steps", 2)
    shown = run(*arguments, "--output-dir", tmp_path / "out")
    assert shown.exit_code == 2
    assert "fit into sinks and window (68 tokens)" in shown.stderr
