"""`fade eval quality`: the same figures as each measure alone, one exact run for all, and what cannot run left out."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commandline import run
from plugin_maker import plugin
from tiny import byte_tokenizer, fresh_seed, save_tiny, tiny_llama
from torch import Tensor
from transformers import DynamicCache

from fade_core import FadeConfig, create_tiered_cache
from fade_core.errors import ConfigError, FadeError, InputError, PluginError
from fade_core.interfaces import Recipe
from fade_core.plugins import Registry, use_registry
from fade_eval import divergence, kl, needle
from fade_eval import plugin as fade_eval_plugin
from fade_eval.bits import packed_bits
from fade_eval.cli.pareto import front
from fade_eval.contenders import Contender, contenders
from fade_eval.quality import quality as measure_quality

SMALL: dict[str, Any] = {"n_sink": 2, "recent_window": 16, "tile": 16}
SIZES: dict[str, Any] = {"prompt_tokens": 70, "steps": 12}
SIDE_BY_SIDE = SIZES | {"batch_size": 3}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(fresh_seed())
    return torch.randint(0, 256, (3, 83))


def tiered(name: str, **fields: Any) -> Contender:
    return Contender(name, lambda model: create_tiered_cache(model, FadeConfig(**SMALL, **fields)))


@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_row_is_what_divergence_says_and_the_exact_cache_runs_once(
    model: Any, ids: Tensor, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def counted(*arguments: Any, **options: Any) -> kl.ExactRun:
        runs.append(len(arguments[1]))
        return kl.run_exact(*arguments, **options)

    monkeypatch.setattr("fade_eval.quality.run_exact", counted)
    configs = {"four": {}, "two": {"keys": {"kind": "uniform", "bits": 2}, "values": {"kind": "uniform", "bits": 2}}}
    told: list[tuple[int, int]] = []
    found = measure_quality(
        model,
        None,
        [tiered(name, **fields) for name, fields in configs.items()],
        ids,
        **SIZES,
        batch_size=batch_size,
        needles=0,
        progress=lambda done, total: told.append((done, total)),
    )
    assert runs == [1, 1, 1] if batch_size == 1 else [2, 1]
    assert told[-1] == (3 * 12 * 3, 3 * 12 * 3)
    assert [row.name for row in found.rows] == ["four", "two"]
    for row, fields in zip(found.rows, configs.values(), strict=True):
        alone = divergence(model, ids, FadeConfig(**SMALL, **fields), **SIZES, batch_size=batch_size)
        for name in ("kl_mean", "kl_standard_error", "kl_p99", "kl_max", "top1_agreement", "perplexity_change"):
            assert getattr(row, name) == getattr(alone, name), name
        assert row.bytes_per_token == alone.held.cache / 82
        assert row.ratio_16bit == alone.held.ratio_16bit
        assert found.exact_perplexity == alone.exact_perplexity
    # 32 bits of scale and minimum: of 16 tokens a channel (keys of "four"), else of 16 channels a token
    assert [row.bits for row in found.rows] == [6, 4]
    assert found.exact_bytes_per_token == 3 * 2 * 2 * 16 * 4
    assert found.rows[0].kl_mean < found.rows[1].kl_mean
    json.dumps(found.to_dict())


@pytest.mark.slow
def test_needles_are_those_of_the_needle_task(model: Any) -> None:
    tokenizer, seed = byte_tokenizer(), fresh_seed()
    found = measure_quality(
        model,
        tokenizer,
        [Contender("exact", lambda m: DynamicCache(config=m.config)), tiered("four")],
        "straw " * 99,
        prompt_tokens=160,
        steps=2,
        needles=2,
        seed=seed,
    )
    alone = needle(
        model, tokenizer, FadeConfig(**SMALL), needles=2, context_tokens=160, seed=seed, haystack="straw " * 99
    )
    assert [row.needles for row in found.rows] == [2, 2]
    assert found.rows[0].needles_kept == found.rows[0].needles_exact == alone.exact_found
    assert found.rows[1].needles_kept == alone.kept


TOKENIZER = byte_tokenizer()


class Reading(torch.nn.Module):
    """A stand-in for a model that reads its cache: it answers with the digits that are still there."""

    config, dtype, device = None, torch.float32, torch.device("cpu")

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool = True) -> Any:
        key = input_ids[:, None, :, None].float()
        keys, _ = past_key_values.update(key, key, 0)
        text = TOKENIZER.decode(keys[0, 0, :, 0].long())
        before, said = text.rpartition(" is")[0], text.rpartition(" is")[2]
        number = " " + "".join(c for c in before if c.isdigit())[-5:]
        logits = torch.zeros(1, input_ids.shape[1], 256)
        logits[0, -1, TOKENIZER(number[len(said) : len(said) + 1] or " ")["input_ids"][0]] = 1
        return type("Out", (), {"logits": logits})


class Forgetful(DynamicCache):
    """Loses the first half of a haystack once it has been read."""

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.get_seq_length(layer) == 300:
            held = self.layers[layer]
            held.keys, held.values = held.keys[:, :, 150:].clone(), held.values[:, :, 150:].clone()
        return super().update(key, value, layer, *args, **kwargs)


def test_a_cache_that_loses_needles_is_found_out(ids: Tensor) -> None:
    caches = [Contender("whole", lambda _: DynamicCache()), Contender("half", lambda _: Forgetful())]
    found = measure_quality(Reading(), byte_tokenizer(), caches, "abc" * 110, prompt_tokens=300, steps=2, needles=5)
    whole, half = found.rows
    assert (whole.needles, whole.needles_kept, whole.needles_exact) == (5, 5, 5)
    assert half.needles_exact == 5
    assert 2 <= half.needles_kept <= 3  # depths 0.1, 0.3, 0.5, 0.7, 0.9: the middle one may straddle the cut
    assert math.isnan(whole.bits)


# --- bits ---


def test_bits_follow_the_tokens_down_the_ladder(model: Any) -> None:
    ladder = [{"tier": "int4", "capacity": 32}, {"tier": "int2", "capacity": "rest"}]
    with torch.no_grad(), create_tiered_cache(model, FadeConfig(**SMALL, ladder=ladder)) as cache:
        model(torch.randint(0, 256, (2, 2 + 16 + 16 * 6)), past_key_values=cache)
        assert packed_bits(cache, model, 2) == (2 * (4 + 2) + 4 * (2 + 2)) / 6  # 2 tiles of int4, 4 of int2
    with torch.no_grad(), create_tiered_cache(model, FadeConfig(**SMALL)) as cache:
        model(torch.randint(0, 256, (1, 10)), past_key_values=cache)
        assert math.isnan(packed_bits(cache, model, 1))


class Halved(DynamicCache):
    """As transformers' QuantizedCache: old tokens elsewhere (here in 8 bits), a residual in ``keys`` and ``values``."""

    def flush(self) -> None:
        for layer in self.layers:
            layer.old = tuple(side[:, :, :-5].to(torch.int8) for side in (layer.keys, layer.values))
            layer.keys, layer.values = (side[:, :, -5:].clone() for side in (layer.keys, layer.values))
            layer.get_seq_length = lambda: 40


def test_bits_of_other_caches_leave_their_residual_out(model: Any) -> None:
    cache = Halved(config=model.config)
    with torch.no_grad():
        model(torch.randint(0, 256, (2, 40)), past_key_values=cache)
    assert math.isnan(packed_bits(cache, model, 2))
    cache.flush()
    assert packed_bits(cache, model, 2) == 8


# --- who takes part ---


def test_recipes_come_from_plugins_with_their_fields(model: Any) -> None:
    def fade_quality_recipes(calibration: str | None) -> list[Recipe]:
        return [Recipe("mine", {"recent_window": 32}), *([Recipe("learnt", {})] if calibration else [])]

    with use_registry(Registry([fade_eval_plugin, plugin("own", fade_quality_recipes)], entry_points=False)):
        shipped = [c.name for c in contenders() if c.source == "recipe" and c.name != "mine"]
        assert {"int4 a token", "KIVI 4", "KIVI 2"} <= set(shipped)
        (mine,) = contenders(only=["MIN"], window=48)
        with mine.factory(model) as cache:
            assert (cache.config.recent_window, cache.config.n_sink) == (32, 4)
        both = contenders({"ours": FadeConfig(n_sink=1)}, only=["learnt"], calibration="f", n_sink=7, window=48)
        assert [c.name for c in both] == ["learnt", "ours"]
        with both[0].factory(model) as cache:
            assert (cache.config.recent_window, cache.config.n_sink) == (48, 7)
        with pytest.raises(ConfigError, match=r"no recipe has 'kivvi'.*KIVI 2"):
            contenders(only=["kivvi"])
        with pytest.raises(ConfigError, match="has the name of a recipe"):
            contenders({"mine": None})
    with (
        use_registry(Registry([fade_eval_plugin], entry_points=False)),
        pytest.raises(ConfigError, match="pip install fade-quant-rotated"),
    ):
        contenders(calibration="f")


def test_two_recipes_of_one_name_name_both_owners() -> None:
    def fade_quality_recipes() -> list[Recipe]:
        return [Recipe("KIVI 4", {})]

    registry = Registry([fade_eval_plugin, plugin("copycat", fade_quality_recipes)], entry_points=False)
    with pytest.raises(PluginError, match=r"'KIVI 4' is provided by fade_eval.plugin and by copycat"):
        registry.quality_recipes()


@pytest.mark.parametrize("answer", [lambda: {"a": {}}, lambda: [{"keys": {}}], lambda: 1 / 0])
def test_recipes_that_are_none_are_the_plugins_failure(answer: Callable[[], Any]) -> None:
    def fade_quality_recipes() -> Any:
        return answer()

    registry = Registry([fade_eval_plugin, plugin("wrong", fade_quality_recipes)], entry_points=False)
    assert len(registry.quality_recipes()) > 3
    (info,) = [info for info in registry.list_plugins() if info.module == "wrong"]
    assert info.status == "failed"
    assert "fade_quality_recipes" in info.reason


def test_what_cannot_run_here_is_left_out_with_the_reason(model: Any, ids: Tensor) -> None:
    def broken(_: Any) -> Any:
        raise RuntimeError("no\ncompiler")

    groups = {"kind": "kivi", "group": 32}
    recipe = Contender("wide", tiered("", keys=groups, values=groups).factory, "recipe")
    peer = Contender("other", broken, "peer")
    found = measure_quality(model, None, [recipe, peer, tiered("fine")], ids, **SIDE_BY_SIDE, needles=0)
    assert [row.name for row in found.rows] == ["fine"]
    assert found.left_out["wide"].startswith("key quantizer of layer 0: groups of 32")
    assert found.left_out["other"] == "RuntimeError: no compiler"
    with pytest.raises(ConfigError, match="wide: key quantizer"):
        measure_quality(model, None, [recipe], ids, **SIDE_BY_SIDE, needles=0)
    with pytest.raises(ConfigError, match="groups of 32"):  # asked for by name: not left out
        measure_quality(model, None, [tiered("own", keys=groups), tiered("fine")], ids, **SIDE_BY_SIDE, needles=0)
    with pytest.raises(RuntimeError, match="compiler"):
        measure_quality(model, None, [Contender("bug", broken, "recipe")], ids, **SIDE_BY_SIDE, needles=0)
    with pytest.raises(FadeError, match="needles must be"):
        measure_quality(model, None, [tiered("fine")], ids, **SIZES, needles=-1)


class Tired(DynamicCache):
    """Gives up when it holds so many tokens."""

    def __init__(self, after: int = 75) -> None:
        super().__init__()
        self.after = after

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.get_seq_length(layer) >= self.after:
            raise MemoryError("no more room")
        return super().update(key, value, layer, *args, **kwargs)


def test_a_peer_that_fails_on_the_way_does_not_take_the_others_down(model: Any, ids: Tensor) -> None:
    tired = Contender("tired", lambda _: Tired(), "peer")
    found = measure_quality(model, None, [tired, tiered("fine")], ids, **SIDE_BY_SIDE, needles=0)
    assert [row.name for row in found.rows] == ["fine"]
    assert found.left_out == {"tired": "MemoryError: no more room"}
    assert found.rows == measure_quality(model, None, [tiered("fine")], ids, **SIDE_BY_SIDE, needles=0).rows
    with pytest.raises(ConfigError, match="tired: MemoryError"):
        measure_quality(model, None, [tired], ids, **SIDE_BY_SIDE, needles=0)
    with pytest.raises(MemoryError):
        measure_quality(model, None, [Contender("own", tired.factory)], ids, **SIDE_BY_SIDE, needles=0)


def test_a_long_run_is_the_divergence_of_its_parts(model: Any, ids: Tensor) -> None:
    coarse = tiered("two", keys={"kind": "uniform", "bits": 2}, values={"kind": "uniform", "bits": 2})
    options = {"prompt_tokens": 70, "steps": 5, "needles": 0}
    found = measure_quality(model, None, [coarse, tiered("four")], ids, **options, long_steps=170)  # type: ignore[arg-type]
    text = ids.flatten()[: 70 + 170]
    alone = kl.run_exact(model, torch.cat([text, text[:1]])[None], 70, steps_per_forward=32)
    for contender, row in zip([coarse, tiered("four")], found.rows, strict=True):
        (steps,) = kl.compare(model, contender.factory, alone, steps_per_forward=32)
        assert row.kl_long_first == pytest.approx(float(steps.kl.mean()), rel=1e-5)  # fewer than 256 steps
        assert row.kl_long_last == pytest.approx(float(steps.kl[-43:].mean()), rel=1e-5)
    assert found.long_steps == 170
    assert measure_quality(model, None, [coarse], ids, **options).rows[0].kl_long_last is None  # type: ignore[arg-type]
    with pytest.raises(InputError, match="249 tokens together and 300 are needed"):
        measure_quality(model, None, [coarse], ids, **options, long_steps=230)  # type: ignore[arg-type]


def test_who_does_not_get_to_the_end_of_a_long_run_is_left_out(model: Any, ids: Tensor) -> None:
    late = Contender("late", lambda _: Tired(after=90), "peer")
    options = {"prompt_tokens": 70, "steps": 5, "needles": 0, "long_steps": 100}
    found = measure_quality(model, None, [late, tiered("fine")], ids, **options)  # type: ignore[arg-type]
    assert [row.name for row in found.rows] == ["fine"]
    assert found.left_out == {"late": "MemoryError: no more room"}


def test_transformers_own_compressed_cache_runs_or_says_why_not(model: Any, ids: Tensor) -> None:
    peers = [c for c in contenders(only=["QuantizedCache"], window=8) if c.source == "peer"]
    assert len(peers) == 5
    found = measure_quality(model, None, [*peers, tiered("four")], ids, **SIDE_BY_SIDE, needles=0)
    assert {row.name for row in found.rows} | set(found.left_out) == {*(c.name for c in peers), "four"}
    for row in found.rows[:-1]:
        nominal = 8 if "fp8" in row.name else int(row.name[-1])
        assert nominal < row.bits < nominal + 4, row
        assert row.kl_mean > 0


# --- the command ---


def test_the_front_is_what_nothing_beats() -> None:
    points = [(4.0, 1.0), (2.0, 3.0), (3.0, 3.5), (math.nan, 0.1), (5.0, 1.0), (2.0, 2.5), (6.0, 0.5)]
    assert front(points) == [5, 0, 6]
    assert front([]) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.slow
def test_the_command_prints_a_table_and_writes_csv_and_plot(folder: Path, tmp_path: Path) -> None:
    FadeConfig(**SMALL).to_file(tmp_path / "ours.toml")
    (tmp_path / "text.txt").write_text("Call me Ishmael. Some years ago, never mind how long. " * 8, encoding="utf-8")
    arguments = (
        *("eval", "quality", "--model", folder, "--text", tmp_path / "text.txt", "--config", tmp_path / "ours.toml"),
        *(
            "--only",
            "int4 a",
            "--only",
            "int2 a",
            "--only",
            "kivi",
            "--window",
            16,
            "--prompt-tokens",
            160,
            "--steps",
            6,
        ),
        *("--output-dir", tmp_path / "out", "--long-steps", 40),
    )
    with use_registry(Registry([fade_eval_plugin], entry_points=False)):
        shown = run(*arguments, "--needles", 1)
        found = json.loads(run(*arguments, "--needles", 0, "--json").stdout)
    assert shown.exit_code == 0, shown.output
    assert found["rows"][0]["kl_long_last"] > 0
    for words in ("last quarter", "int4 a token", "ours", "0 of 0", "bytes a token", "quality.csv"):
        assert words in shown.stdout, words
    assert "left out: KIVI 4: value quantizer of layer 0: groups of 32" in shown.stderr
    with (tmp_path / "out" / "quality.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["name"] for line in lines] == [row["name"] for row in found["rows"]]
    assert float(lines[0]["kl_mean"]) == found["rows"][0]["kl_mean"] > 0
    assert [float(line["kl_long_last"]) for line in lines] == [row["kl_long_last"] for row in found["rows"]]
    assert {line["texts"] for line in lines} == {"1"}
    assert [line["bits"] for line in lines] == ["6.0", "4.0", "6.0"]
    assert (tmp_path / "out" / "quality.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("--calibration", "missing.safetensors"), "no such file"),
        (("--only", "cheese"), "no recipe has 'cheese'"),
        (("--config", "saef"), "did you mean 'safe'"),
        (("--text", "missing.txt"), "missing.txt cannot be read"),
    ],
)
def test_the_command_refuses_what_makes_no_sense_before_the_model_is_loaded(
    tmp_path: Path, arguments: tuple[str, ...], wanted: str
) -> None:
    result = run("eval", "quality", "--model", "/nowhere", "--output-dir", tmp_path / "out", *arguments)
    assert result.exit_code == 2
    assert wanted in result.stderr
