"""The command line on a tiny model: every command, in text and in JSON, and what it says when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from tiny import byte_tokenizer, save_tiny, tiny_llama
from typer.testing import CliRunner, Result

from fade_core import FadeConfig, create_tiered_cache
from fade_core.cache.named_caches import configuration
from fade_core.cli import demo as demo_module
from fade_core.cli.app import build_app
from fade_core.cli.console import size
from fade_core.cli.inspect import predict
from fade_core.cli.picture import TierPicture, draw
from fade_core.cli.prompts import chat_ids, document_ids
from fade_core.cli.streaming import TokenWatch
from fade_core.errors import ConfigError, InputError
from fade_core.eval import contenders
from fade_core.models.loading import exact_cache
from fade_core.plugins import Registry, use_registry
from fade_core.plugins.hookspecs import hookimpl
from fade_core.support.memory import live_bytes

TEXT = "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fade(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.setenv("COLUMNS", "250")
    return lambda *arguments: CliRunner().invoke(build_app(), [str(a) for a in arguments])


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


def ok(result: Result) -> str:
    assert result.exit_code == 0, result.output
    return result.stdout


def data(result: Result) -> Any:
    return json.loads(ok(result))


# --- help and errors ---


def test_every_command_has_help(fade: Callable[..., Result]) -> None:
    listed = ok(fade("--help"))
    for command in ("demo", "generate", "plugins", "config", "eval", "bench", "inspect", "check"):
        assert command in listed
        assert "Usage" in ok(fade(command, "--help"))
    assert ok(fade("--version")).startswith("fade-core ")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("generate", "hi", "--model", "/nowhere"), "no such folder"),
        (("generate", "--model", "FOLDER"), "give one prompt"),
        (("generate", "hi", "--file", "x.txt"), "give one prompt"),
        (("generate", "--file", "missing.txt", "--model", "FOLDER"), "missing.txt cannot be read"),
        (("generate", "hi", "--config", "saef", "--model", "FOLDER"), "did you mean 'safe'"),
        (("generate", "hi", "--dtype", "float17", "--model", "FOLDER"), "float17"),
        (("eval", "divergnce", "--model", "FOLDER"), "did you mean 'divergence'"),
        (("eval", "qualty", "--model", "FOLDER"), "did you mean 'quality'"),
        (("eval", "perplexity", "--text", "missing.txt", "--model", "FOLDER"), "missing.txt cannot be read"),
        (("bench", "--config", "safe", "--config", "safe", "--model", "FOLDER"), "compared already"),
        (("check", "policies:h20"), "did you mean 'h2o'"),
        (("check", "cheese"), "KIND:NAME"),
        (("inspect", "missing.safetensors"), "no such file"),
        (("demo", "--document", "x.txt"), "needs a --question"),
        (("demo", "--model", "FOLDER", "--prompt-tokens", "4000"), "does not fit"),
        (("config", "show", "nothing.toml"), "no such file"),
    ],
)
def test_errors_are_one_clear_message_and_exit_code_2(
    fade: Callable[..., Result], folder: Path, tmp_path: Path, arguments: tuple[str, ...], wanted: str
) -> None:
    result = fade(*(folder if a == "FOLDER" else a for a in arguments))
    assert result.exit_code == 2, result.output
    assert wanted in result.stderr
    assert "Traceback" not in result.output


# --- generate ---


def test_generate_streams_what_the_model_says(fade: Callable[..., Result], folder: Path, small: Path) -> None:
    arguments = ("generate", TEXT, "--model", folder, "--max-new-tokens", 24, "--config")
    found = data(fade(*arguments, small, "--json"))
    streamed = fade(*arguments, small)
    assert ok(streamed).strip() == found["text"].strip()
    assert (found["prompt_tokens"], found["new_tokens"]) == (len(TEXT), 24)
    assert 0 < found["ratio"] < 0.5
    assert found["held_bytes"] == sum(found["tiers"].values())
    assert "tokens per second" in streamed.stderr
    exact = data(fade(*arguments, "exact", "--json"))
    model, ids = tiny_llama(), torch.tensor([byte_tokenizer()(TEXT)["input_ids"]])
    wanted = model.generate(ids, max_new_tokens=24, do_sample=False)[0, len(TEXT) :]
    assert exact["text"] == byte_tokenizer().decode(wanted, skip_special_tokens=True)
    assert exact["held_bytes"] == 3 * 2 * (len(TEXT) + 23) * 2 * 16 * 4
    assert "ratio" not in exact


def test_generate_reads_files_and_samples_with_a_seed(
    fade: Callable[..., Result], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text(TEXT, encoding="utf-8")
    arguments = ("generate", "--file", tmp_path / "prompt.txt", "--model", folder, "--max-new-tokens", 12, "--json")
    sampled = [data(fade(*arguments, "--temperature", "1.5", "--seed", seed))["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_half_characters_wait_for_the_rest() -> None:
    pieces: list[str] = []
    watch = TokenWatch(byte_tokenizer(), pieces.append)
    watch.put(torch.tensor([[1, 2, 3]]))
    for token in byte_tokenizer()("né!")["input_ids"]:
        watch.put(torch.tensor([token]))
    watch.end()
    assert "".join(pieces) == "né!"
    assert not any("\ufffd" in piece for piece in pieces)
    assert watch.tokens_per_second is not None
    assert TokenWatch().tokens_per_second is None


# --- config ---


@pytest.mark.parametrize("format", ["toml", "yaml", "json"])
@pytest.mark.parametrize("preset", ["safe", "balanced", "aggressive"])
def test_what_config_show_prints_is_a_configuration(
    fade: Callable[..., Result], tmp_path: Path, format: str, preset: str
) -> None:
    path = tmp_path / f"shown.{format}"
    path.write_text(ok(fade("config", "show", preset, "--format", format)), encoding="utf-8")
    assert FadeConfig.from_file(path) == getattr(FadeConfig, preset)()
    assert str(path) in ok(fade("config", "validate", path))


def test_config_validate_names_every_problem_of_every_file(
    fade: Callable[..., Result], tmp_path: Path, small: Path
) -> None:
    (tmp_path / "typo.toml").write_text("recent_windw = 4\n")
    (tmp_path / "broken.json").write_text("{")
    result = fade("config", "validate", tmp_path / "typo.toml", small, tmp_path / "broken.json")
    assert result.exit_code == 2
    assert "recent_window" in result.stderr
    assert "not valid JSON" in result.stderr
    assert f"{small}: valid" in result.stdout


def test_config_schema_is_json_schema(fade: Callable[..., Result], tmp_path: Path) -> None:
    schema = data(fade("config", "schema"))
    assert {"keys", "policy", "ladder"} <= schema["properties"].keys()
    ok(fade("config", "schema", "--output", tmp_path / "schema.json"))
    assert json.loads((tmp_path / "schema.json").read_text()) == schema


# --- plugins ---


class Broken:
    @staticmethod
    @hookimpl
    def fade_policies() -> list[Any]:
        raise RuntimeError("no policies today")


def test_plugins_are_listed_with_status_and_reason(fade: Callable[..., Result]) -> None:
    with use_registry(Registry([Broken()], entry_points=False)):
        found = data(fade("plugins", "--json"))
        shown = ok(fade("plugins"))
    status = {plugin["dist"]: plugin for plugin in found["plugins"]}
    assert status["fade-core"]["status"] == "loaded"
    (broken,) = [plugin for name, plugin in status.items() if name != "fade-core"]
    assert broken["status"] == "failed"
    assert "no policies today" in broken["reason"]
    assert "no policies today" in shown
    kernels = {(kernel["op"], kernel["name"]): kernel for kernel in found["kernels"]}
    assert kernels["decode_attention", "torch"]["supported"]
    assert all(kernel["supported"] or kernel["reason"] for kernel in found["kernels"])


# --- eval ---


def test_eval_compares_configurations(fade: Callable[..., Result], folder: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    arguments = ("--model", folder, "--text", tmp_path / "text.txt", "--prompt-tokens", 96, "--steps", 8)
    found = data(fade("eval", "divergence", *arguments, "--config", small, "--config", "exact", "--json"))
    results = found["results"]
    assert results["exact"]["kl_mean"] == 0 < results["small"]["kl_mean"]
    assert results["small"]["held"]["ratio"] < 0.6
    assert results["small"]["steps"] == 8
    shown = ok(fade("eval", "perplexity", *arguments, "--config", small))
    assert "perplexity" in shown
    assert "small" in shown
    (tmp_path / "straw.txt").write_text("straw " * 99, encoding="utf-8")
    straw = ("--text", tmp_path / "straw.txt", "--prompt-tokens", 128, "--count", 2)
    asked = data(fade("eval", "needle", "--model", folder, *straw, "--config", small, "--json"))
    assert asked["results"]["small"]["needles"] == 2


def test_eval_lists_its_tasks(fade: Callable[..., Result]) -> None:
    listed = ok(fade("eval"))
    assert all(name in listed for name in ("divergence", "perplexity", "needle"))


# --- bench ---


def test_bench_takes_turns_and_gives_the_attention_back(
    fade: Callable[..., Result], folder: Path, small: Path, evicting: Path
) -> None:
    arguments = ("bench", "--model", folder, "--prompt-tokens", 128, "--rounds", 3, "--steps", 2)
    found = data(fade(*arguments, "--config", small, "--config", evicting, "--json"))
    assert list(found["results"]) == ["exact", "small", "evicting"]
    for result in found["results"].values():
        assert result["ms"] > 0
        assert result["tokens"] == 128 + 4 * 2  # one warm-up turn
    exact = found["results"]["exact"]
    assert exact["ratio"] == 1
    assert exact["held_bytes"] == 3 * 2 * 136 * 2 * 16 * 4
    assert found["results"]["small"]["held_bytes"] < exact["held_bytes"] / 2
    shown = ok(fade(*arguments, "--config", small))
    assert "time to exact" in shown


def test_bench_times_the_peers_that_are_installed(
    fade: Callable[..., Result], folder: Path, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def here(model: Any) -> Any:
        ran.append(model.config._attn_implementation)
        return exact_cache(model)

    def missing(model: Any) -> Any:
        raise ImportError("pip install it")

    found = [contenders.Contender("here", here, "peer"), contenders.Contender("elsewhere", missing, "peer")]
    monkeypatch.setattr(contenders, "peers", lambda window: found)
    arguments = ("bench", "--model", folder, "--prompt-tokens", 64, "--rounds", 1, "--steps", 1, "--config", small)
    assert list(data(fade(*arguments, "--json"))["results"]) == ["exact", "small"]
    shown = fade(*arguments, "--peers", "--json")
    assert list(data(shown)["results"]) == ["exact", "small", "here"]
    assert "left out: elsewhere: ImportError: pip install it" in shown.stderr
    assert len(ran) == 2  # tried, then timed


DECODE = ("bench", "decode", "--shape", "tiny", "--context", 90, "--steps", 4, "--warmup", 2)


def test_bench_decode_times_what_is_the_same(fade: Callable[..., Result], tmp_path: Path) -> None:
    found = data(fade(*DECODE, "--batch", 1, "--batch", 2, "--output-dir", tmp_path, "--json"))
    assert [(r["batch"], r["context"], r["graphs"]) for r in found["results"]] == [(1, 90, 0), (2, 90, 0)]
    for result in found["results"]:
        assert result["ours"] < 1e-5
        assert list(result["times"]) == ["DynamicCache", "StaticCache, compiled", "FADE", "FADE, compiled"]
        assert all(time["ms"] > 0 and time["prefill_ms"] > 0 for time in result["times"].values())
        assert result["times"]["FADE, compiled"]["kernels"] == "torch, torch"
    assert json.loads((tmp_path / "decode.json").read_text())["results"] == found["results"]
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def test_bench_decode_prints_no_time_where_parity_is_red(
    fade: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fade_core.eval import generating

    gaps = iter([1.0, 0.1])
    monkeypatch.setattr(generating, "distance", lambda found, wanted: next(gaps))
    shown = fade(*DECODE)
    assert shown.exit_code == 1
    assert "parity: compiled FADE 1.00e+00" in shown.stdout
    assert "no time is worth printing" in shown.stderr
    assert "DynamicCache │" not in shown.stdout


def test_bench_decode_refuses_what_does_not_compile(fade: Callable[..., Result], tmp_path: Path) -> None:
    two = tmp_path / "two.toml"
    two.write_text('ladder = [{tier = "int4", capacity = 64}, {tier = "int2"}]')
    assert "cannot be compiled: layer 0: its ladder has 2 tiers" in fade(*DECODE, "--config", str(two)).stderr
    assert "unknown shape" in fade(*DECODE[:3], "huge").stderr
    if not torch.cuda.is_available():
        assert "on a GPU only" in fade(*DECODE, "--profile").stderr


@pytest.mark.parametrize("config", ["safe", "aggressive"])
def test_bench_batch_finds_the_last_batch_that_fits(fade: Callable[..., Result], config: str) -> None:
    from fade_core.eval.batches import _Runs
    from fade_core.eval.generating import FIXED, STATIC, random_model

    options = ("--shape", "tiny", "--context", 700, "--limit", 0.012, "--steps", 2, "--config", config)
    found = data(fade("bench", "batch", *options, "--json"))["results"]
    assert [one["cache"] for one in found] == ["StaticCache", "FADE"]
    assert found[1]["rows"] > 2 * found[0]["rows"] > 0
    runs = _Runs(random_model("tiny", torch.device("cpu"), torch.float32), configuration(config), 700, 2)
    for one, name in zip(found, (STATIC, FIXED), strict=True):
        total, held = runs._decoded(name, one["rows"], 12_000_000)
        assert total is not None
        assert abs(total - one["bytes"]) < 0.02 * total
        assert held == one["held_bytes"] < total <= 12e6
        assert runs._decoded(name, one["rows"] + 1, 12_000_000)[0] > 12e6  # type: ignore[operator]
    assert "0 " in fade("bench", "batch", *options[:4], "--limit", 0.001).stdout  # not even the weights
    assert "holds no prompt" in fade("bench", "batch", *options[:2], "--context", 3).stderr


def test_step_times_restore_the_models_attention() -> None:
    from fade_core.cache.named_caches import tiered_factory
    from fade_core.eval.speed import step_times

    model = tiny_llama()
    before = model.config._attn_implementation
    factory = tiered_factory(FadeConfig(n_sink=2, recent_window=16, tile=16))
    step_times(model, torch.randint(0, 256, (1, 64)), {"small": factory}, rounds=1, steps=1)
    assert model.config._attn_implementation == before
    with pytest.raises(InputError, match="exact"):
        step_times(model, torch.randint(0, 256, (1, 64)), {"exact": factory})


# --- inspect ---


def test_inspect_predicts_what_is_held(fade: Callable[..., Result], folder: Path, small: Path) -> None:
    found = data(fade("inspect", "--model", folder, "--config", small, "--tokens", 100, "--tokens", 400, "--json"))
    assert (found["layers"], found["kv_heads"], found["head_dim"]) == (3, 2, 16)
    assert found["tiers"][0]["layers"] == "0-2"
    model = tiny_llama()
    for predicted in found["predicted"]:
        with torch.no_grad(), create_tiered_cache(model, FadeConfig.from_file(small)) as cache:
            model(torch.randint(0, 256, (1, predicted["tokens"])), past_key_values=cache)
            held = live_bytes(cache, exclude=model)
        assert predicted["total"] <= held <= 1.15 * predicted["total"]
        assert predicted["exact"] == 3 * 2 * predicted["tokens"] * 2 * 16 * 4
    assert "capacity" in ok(fade("inspect", "--model", folder, "--config", "aggressive"))


def test_inspect_counts_what_is_evicted(folder: Path, evicting: Path) -> None:
    from fade_core.models.loading import load_skeleton

    skeleton = load_skeleton(folder)
    assert next(skeleton.parameters()).device.type == "meta"
    cache = create_tiered_cache(skeleton, FadeConfig.from_file(evicting))
    predicted = predict(cache.tiered, 400, skeleton)
    cache.detach()
    assert predicted.evicted > 0.4 * 400 * 3 * 2


def test_inspect_reads_saved_caches(fade: Callable[..., Result], small: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad(), create_tiered_cache(model, FadeConfig.from_file(small)) as cache:
        model(torch.randint(0, 256, (1, 90)), past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        cache.dump_debug(tmp_path / "cache.json")
    for name in ("cache.safetensors", "cache.json"):
        found = data(fade("inspect", tmp_path / name, "--json"))
        assert (found["tokens"], found["layers"]) == (90, 3)
        assert FadeConfig(**found["config"]) == FadeConfig.from_file(small)
        assert "recent_window: 16" in ok(fade("inspect", tmp_path / name))
    (tmp_path / "other.json").write_text("[]")
    assert "not what cache.dump_debug() writes" in fade("inspect", tmp_path / "other.json").stderr
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    assert "not a safetensors file" in fade("inspect", tmp_path / "bad.safetensors").stderr


# --- demo ---


def test_demo_answers_measures_and_draws(
    fade: Callable[..., Result],
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
        fade(
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


def test_the_picture_shows_each_token_in_the_colour_of_its_tier(tmp_path: Path) -> None:
    from matplotlib.image import imread

    tiers = torch.zeros(6, 200, dtype=torch.long)
    tiers[:, 50:150] = 1
    tiers[:, 100:150] = -1
    picture = TierPicture(("fp16", "int4"), (0, 1, 2), tiers)
    assert picture.shares() == {"fp16": 0.5, "int4": 0.25, "evicted": 0.25}
    draw({"one": picture, "two": picture}, tmp_path / "tiers.png")
    image = imread(tmp_path / "tiers.png")
    colours = {tuple(round(float(c), 2) for c in pixel) for pixel in image.reshape(-1, 4)[:, :3]}
    for colour in ("#14213d", "#2a6f97", "#f2f2f2"):
        assert tuple(round(int(colour[i : i + 2], 16) / 255, 2) for i in (1, 3, 5)) in colours


def test_a_document_is_cut_to_fit_and_the_question_stays() -> None:
    tokenizer = byte_tokenizer()
    whole = document_ids(tokenizer, TEXT, "Who?", None)
    cut = document_ids(tokenizer, TEXT, "Who?", 200)
    assert whole.shape[1] > 400
    assert cut.shape == (1, 200)
    assert tokenizer.decode(cut[0]).endswith("Who?")
    with pytest.raises(InputError, match="no room"):
        document_ids(tokenizer, TEXT, "Who?", 20)
    with pytest.raises(InputError, match="empty"):
        chat_ids(tokenizer, "")


def test_the_chat_template_is_used_unless_raw() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    assert tokenizer.decode(chat_ids(tokenizer, "hi")[0]) == "<user>hi<assistant>"
    assert tokenizer.decode(chat_ids(tokenizer, "hi", raw=True)[0]) == "hi"


# --- check ---


def test_check_prints_results_and_fails_with_the_component(fade: Callable[..., Result]) -> None:
    assert "passed" in ok(fade("check", "policies:h2o", "--seed", 3))
    report = data(fade("check", "quantizers:uniform", "--set", "bits=2", "--json"))
    assert report["ok"]

    class Failing:
        @staticmethod
        @hookimpl
        def fade_policies() -> list[Any]:
            from test_conformance_kit import NoisyConfig

            return [NoisyConfig]

    with use_registry(Registry([Failing()], entry_points=False)):
        result = fade("check", "policies:noisy")
    assert result.exit_code == 1
    assert "failed" in result.stdout


# --- plugin commands ---


def hello(name: str = "you") -> None:
    """Say hello."""
    typer.echo(f"hello {name}")


def refuse() -> None:
    raise ConfigError("this plugin refuses")


def crash() -> None:
    raise RuntimeError("boom")


def impossible(what: list[list[int]]) -> None:
    """A signature that no command line can have."""


class Commands:
    @staticmethod
    @hookimpl
    def fade_commands(app: typer.Typer) -> None:
        for command in (hello, refuse, crash, impossible):
            app.command()(command)
        app.command("demo")(hello)
        nested = typer.Typer()
        nested.command("one")(hello)
        nested.command("two")(refuse)
        app.add_typer(nested, name="nested")
        timing = typer.Typer()
        timing.command("hello")(hello)
        timing.command("decode")(refuse)
        app.add_typer(timing, name="bench")


class HalfWay:
    @staticmethod
    @hookimpl
    def fade_commands(app: typer.Typer) -> None:
        raise RuntimeError("no commands today")


def test_plugin_commands_join_and_cannot_break_the_host(
    fade: Callable[..., Result], capsys: pytest.CaptureFixture[str]
) -> None:
    with use_registry(Registry([Commands(), HalfWay()], entry_points=False)):
        assert ok(fade("hello", "--name", "there")).strip() == "hello there"
        assert ok(fade("nested", "one")).strip() == "hello you"
        refused = fade("refuse")
        assert refused.exit_code == 2
        assert "this plugin refuses" in refused.stderr
        assert fade("nested", "two").exit_code == 2
        assert ok(fade("bench", "hello")).strip() == "hello you"  # beside the built-in ones
        assert "StaticCache" in ok(fade("bench", "decode", "--help"))
        assert isinstance(fade("crash").exception, RuntimeError)
        capsys.readouterr()
        assert "Answer a question about a long document" in ok(fade("--help"))  # the built-in demo
        warnings = capsys.readouterr().err
        assert "'impossible' is left out" in warnings
        assert "'demo' is left out: another command has that name" in warnings
        assert "'decode' is left out: another command has that name" in warnings
        assert "no commands today" in ok(fade("plugins"))


def test_sizes_are_for_people() -> None:
    assert [size(n) for n in (12, 1500, 2_340_000, 5e9)] == ["12 B", "1.5 kB", "2.3 MB", "5.0 GB"]


@pytest.mark.real_model
@pytest.mark.slow
def test_the_demo_on_the_real_model(
    fade: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo_module, "CHECKED", 64)
    ok(fade("demo", "--prompt-tokens", 1024, "--config", "safe", "--output-dir", tmp_path, "--max-new-tokens", 16))
    safe = json.loads((tmp_path / "demo.json").read_text())["caches"]["safe"]
    assert safe["kl"] <= 0.01
    assert safe["top1"] >= 0.9
    assert safe["held"] < 0.3 * json.loads((tmp_path / "demo.json").read_text())["caches"]["exact"]["held"]
