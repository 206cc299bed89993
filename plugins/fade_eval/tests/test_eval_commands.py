"""``fade demo``, ``fade eval`` and ``fade bench`` on a tiny model."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import textwrap
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commandline import TEXT, data, ok, run
from tiny import save_tiny, tiny_llama

import fade_eval
from fade_core import FadeConfig
from fade_core.cache.named_caches import configuration, tiered_factory
from fade_core.errors import InputError
from fade_core.models.loading import exact_cache
from fade_core.plugins import Registry, use_registry
from fade_core.plugins.hookspecs import hookimpl
from fade_eval import contenders, plugin
from fade_eval.batches import _Runs
from fade_eval.cli import demo as demo_module
from fade_eval.cli.picture import TierPicture, draw
from fade_eval.generating import FIXED, STATIC
from fade_eval.shapes import random_model
from fade_eval.speed import step_times


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A configuration that compresses short prompts."""
    path = tmp_path / "small.toml"
    FadeConfig(n_sink=2, recent_window=16, tile=16).to_file(path)
    return path


@pytest.fixture
def evicting(tmp_path: Path) -> Path:
    path = tmp_path / "evicting.yaml"
    FadeConfig(n_sink=2, recent_window=16, tile=16, policy={"kind": "h2o", "budget": 0.5, "every": 16}).to_file(path)
    return path


def test_every_command_has_help() -> None:
    listed = ok(run("--help"))
    for command in ("demo", "eval", "bench"):
        assert command in listed
        assert "Usage" in ok(run(command, "--help"))


def test_the_core_has_the_names_too() -> None:
    from fade_core import eval as alias

    assert alias.needle is fade_eval.needle
    assert {getattr(alias, name) for name in alias.__all__} <= {getattr(fade_eval, name) for name in fade_eval.__all__}
    with pytest.raises(ImportError, match="perplexitty"):
        from fade_core.eval import perplexitty  # noqa: F401 (misspelt)


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    code = """
        import sys
        from fade_eval.cli import bench, demo, evaluate
        sys.exit(", ".join({"torch", "transformers", "matplotlib"} & set(sys.modules)) or 0)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


def test_only_what_draws_imports_matplotlib() -> None:
    for path in Path(fade_eval.__path__[0]).rglob("*.py"):
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        assert not any("matplotlib" in ast.unparse(node) for node in top), path


def hello() -> None:
    """Say hello."""
    typer.echo("hello")


class Beside:
    @staticmethod
    @hookimpl
    def fade_commands(app: typer.Typer) -> None:
        for group in ("bench", "eval"):
            offered = typer.Typer()
            offered.command("hello")(hello)
            offered.command("decode" if group == "bench" else "quality")(hello)
            app.add_typer(offered, name=group)


@pytest.mark.parametrize("others", [[Beside(), plugin], [plugin, Beside()]])
def test_other_plugins_add_to_the_groups(others: list[Any]) -> None:
    with use_registry(Registry(others, entry_points=False)):
        for group, own in (("bench", "decode"), ("eval", "quality")):
            assert ok(run(group, "hello")).strip() == "hello"
            shown = run(group, own, "--help")
            assert "--json" in ok(shown)
            assert f"'{own}' is left out: another command has that name" in shown.stderr
        assert "divergence" in ok(run("eval"))
    with use_registry(Registry([plugin], entry_points=False)):  # nothing of it is left in the groups themselves
        assert "hello" not in ok(run("eval", "--help")) + ok(run("bench", "--help"))


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("eval", "divergnce", "--model", "FOLDER"), "did you mean 'divergence'"),
        (("eval", "qualty", "--model", "FOLDER"), "did you mean 'quality'"),
        (("eval", "perplexity", "--text", "missing.txt", "--model", "FOLDER"), "missing.txt cannot be read"),
        (("bench", "--config", "safe", "--config", "safe", "--model", "FOLDER"), "compared already"),
        (("demo", "--document", "x.txt"), "needs a --question"),
        (("demo", "--model", "FOLDER", "--prompt-tokens", "4000"), "does not fit"),
    ],
)
def test_errors_are_one_clear_message_and_exit_code_2(folder: Path, arguments: tuple[str, ...], wanted: str) -> None:
    result = run(*(folder if a == "FOLDER" else a for a in arguments))
    assert result.exit_code == 2, result.output
    assert wanted in result.stderr
    assert "Traceback" not in result.output


# --- eval ---


@pytest.mark.slow
def test_eval_compares_configurations(folder: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = ("--model", folder, "--text", tmp_path / "text.txt", "--prompt-tokens", 96, "--steps", 8)
    found = data(run("eval", "divergence", *arguments, "--config", small, "--config", "exact", "--json"))
    results = found["results"]
    assert results["exact"]["kl_mean"] == 0 < results["small"]["kl_mean"]
    assert results["small"]["held"]["ratio"] < 0.6
    assert results["small"]["steps"] == 8
    shown = ok(run("eval", "perplexity", *arguments, "--config", small))
    assert "perplexity" in shown
    assert "small" in shown
    (tmp_path / "straw.txt").write_text("straw " * 99, encoding="utf-8")
    straw = ("--text", tmp_path / "straw.txt", "--prompt-tokens", 128, "--count", 2)
    asked = data(run("eval", "needle", "--model", folder, *straw, "--config", small, "--json"))
    assert asked["results"]["small"]["needles"] == 2


def test_eval_lists_its_tasks() -> None:
    listed = ok(run("eval"))
    assert all(name in listed for name in ("divergence", "perplexity", "needle"))


# --- bench ---


def test_bench_takes_turns_and_gives_the_attention_back(folder: Path, small: Path, evicting: Path) -> None:
    arguments = ("bench", "--model", folder, "--prompt-tokens", 128, "--rounds", 3, "--steps", 2)
    found = data(run(*arguments, "--config", small, "--config", evicting, "--json"))
    assert list(found["results"]) == ["exact", "small", "evicting"]
    for result in found["results"].values():
        assert result["ms"] > 0
        assert result["tokens"] == 128 + 4 * 2  # one warm-up turn
    exact = found["results"]["exact"]
    assert exact["ratio"] == 1
    assert exact["held_bytes"] == 3 * 2 * 136 * 2 * 16 * 4
    assert found["results"]["small"]["held_bytes"] < exact["held_bytes"] / 2
    shown = ok(run(*arguments, "--config", small))
    assert "time to exact" in shown


def test_bench_times_the_peers_that_are_installed(folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def here(model: Any) -> Any:
        ran.append(model.config._attn_implementation)
        return exact_cache(model)

    def missing(model: Any) -> Any:
        raise ImportError("pip install it")

    found = [contenders.Contender("here", here, "peer"), contenders.Contender("elsewhere", missing, "peer")]
    monkeypatch.setattr(contenders, "peers", lambda window: found)
    arguments = ("bench", "--model", folder, "--prompt-tokens", 64, "--rounds", 1, "--steps", 1, "--config", small)
    assert list(data(run(*arguments, "--json"))["results"]) == ["exact", "small"]
    shown = run(*arguments, "--peers", "--json")
    assert list(data(shown)["results"]) == ["exact", "small", "here"]
    assert "left out: elsewhere: ImportError: pip install it" in shown.stderr
    assert len(ran) == 2  # tried, then timed


@pytest.mark.parametrize("config", ["safe", "aggressive"])
def test_bench_batch_finds_the_last_batch_that_fits(config: str) -> None:
    options = ("--shape", "tiny", "--context", 700, "--limit", 0.012, "--steps", 2, "--config", config)
    found = data(run("bench", "batch", *options, "--json"))["results"]
    assert [one["cache"] for one in found] == ["StaticCache", "FADE"]
    assert found[1]["rows"] > found[0]["rows"] > 0
    assert 2 * found[1]["row_bytes"] < found[0]["row_bytes"]  # a step of torch's unpacks as much as the cache holds
    runs = _Runs(random_model("tiny", torch.device("cpu")), configuration(config), 700, 2)
    for one, name in zip(found, (STATIC, FIXED), strict=True):
        total, held = runs._decoded(name, one["rows"], 12_000_000)
        assert total is not None
        assert abs(total - one["bytes"]) < 0.02 * total
        assert held == one["held_bytes"] < total <= 12e6
        assert runs._decoded(name, one["rows"] + 1, 12_000_000)[0] > 12e6  # type: ignore[operator]
    assert "0 " in run("bench", "batch", *options[:4], "--limit", 0.001).stdout  # not even the weights
    assert "holds no prompt" in run("bench", "batch", *options[:2], "--context", 3).stderr


def test_step_times_restore_the_models_attention() -> None:
    model = tiny_llama()
    before = model.config._attn_implementation
    factory = tiered_factory(FadeConfig(n_sink=2, recent_window=16, tile=16))
    step_times(model, torch.randint(0, 256, (1, 64)), {"small": factory}, rounds=1, steps=1)
    assert model.config._attn_implementation == before
    with pytest.raises(InputError, match="exact"):
        step_times(model, torch.randint(0, 256, (1, 64)), {"exact": factory})


# --- demo ---


def test_demo_answers_measures_and_draws(
    folder: Path,
    small: Path,
    evicting: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo_module, "CHECKED", 24)
    out = tmp_path / "out"
    (tmp_path / "book.txt").write_text(TEXT * 3, encoding="utf-8")
    shown = ok(
        run(
            *("demo", "--model", folder, "--document", tmp_path / "book.txt", "--question", "Who speaks?"),
            *("--config", small, "--config", evicting, "--output-dir", out),
            *("--prompt-tokens", 400, "--max-new-tokens", 8),
        )
    )
    for word in ("exact", "small", "evicting", "bytes held", "top-1", "KL", "peak", "tokens/s"):
        assert word in shown
    figures = json.loads((out / "demo.json").read_text())
    caches = figures["caches"]
    assert figures["prompt_tokens"] == 400
    assert caches["exact"]["held"] == 3 * 2 * (400 + 7) * 2 * 16 * 4
    assert caches["evicting"]["held"] < caches["small"]["held"] < caches["exact"]["held"]
    assert caches["exact"]["kl"] == 0 < caches["small"]["kl"]
    assert 0 <= caches["small"]["top1"] <= 1
    assert caches["evicting"]["tiers"]["evicted"] > 0.3
    assert caches["small"]["tiers"]["evicted"] == 0
    assert caches["small"]["peak"] > 0
    assert all(cache["tokens_per_second"] > 0 for cache in caches.values())
    assert (out / "tiers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_picture_shows_each_token_in_the_colour_of_its_tier(tmp_path: Path) -> None:
    import numpy as np
    from matplotlib.image import imread

    tiers = torch.zeros(6, 200, dtype=torch.long)
    tiers[:, 50:150] = 1
    tiers[:, 100:150] = -1
    picture = TierPicture(("fp16", "int4"), (0, 1, 2), tiers)
    assert picture.shares() == {"fp16": 0.5, "int4": 0.25, "evicted": 0.25}
    draw({"one": picture, "two": picture}, tmp_path / "tiers.png")
    image = imread(tmp_path / "tiers.png")
    colours = {tuple(round(float(c), 2) for c in pixel) for pixel in np.unique(image.reshape(-1, 4)[:, :3], axis=0)}
    for colour in ("#14213d", "#2a6f97", "#f2f2f2"):
        assert tuple(round(int(colour[i : i + 2], 16) / 255, 2) for i in (1, 3, 5)) in colours


@pytest.mark.real_model
@pytest.mark.slow
def test_the_demo_on_the_real_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, smollm2_folder: Path) -> None:
    """Out of a folder; test_loading.py says that its own default, the wheel, holds the same."""
    assert signature(demo_module.demo).parameters["model"].default == "smollm2"
    monkeypatch.setattr(demo_module, "CHECKED", 32)
    monkeypatch.setattr(demo_module, "TIMED", 4)
    options = ("--prompt-tokens", 512, "--config", "safe", "--max-new-tokens", 8)
    ok(run("demo", "--model", smollm2_folder, *options, "--output-dir", tmp_path))
    safe = json.loads((tmp_path / "demo.json").read_text())["caches"]["safe"]
    assert safe["kl"] <= 0.01
    assert safe["top1"] >= 0.9
    assert safe["held"] < 0.4 * json.loads((tmp_path / "demo.json").read_text())["caches"]["exact"]["held"]
