"""The command line on a tiny model: every command, in text and in JSON, and what it says when something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from commandline import TEXT, data, ok, run
from plugin_maker import plugin
from tiny import byte_tokenizer, save_tiny, tiny_llama

from fade_core import FadeConfig, create_tiered_cache
from fade_core import eval as fade_eval_alias
from fade_core.cli.app import COMMANDS
from fade_core.cli.console import size
from fade_core.cli.inspect import predict
from fade_core.cli.prompts import chat_ids, document_ids
from fade_core.cli.streaming import TokenWatch
from fade_core.errors import ConfigError, InputError
from fade_core.interfaces import Preset
from fade_core.plugins import Registry, default_registry, use_registry
from fade_core.plugins.hookspecs import hookimpl
from fade_core.support.memory import live_bytes


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


# --- help and errors ---


def test_every_command_has_help() -> None:
    listed = ok(run("--help"))
    for command in ("generate", "plugins", "config", "inspect", "check"):
        assert command in listed
        assert "Usage" in ok(run(command, "--help"))
    assert ok(run("--version")).startswith("fade-core ")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("generate", "hi", "--model", "/nowhere"), "no such folder"),
        (("generate", "--model", "FOLDER"), "give one prompt"),
        (("generate", "hi", "--file", "x.txt"), "give one prompt"),
        (("generate", "--file", "missing.txt", "--model", "FOLDER"), "missing.txt cannot be read"),
        (("generate", "hi", "--config", "saef", "--model", "FOLDER"), "did you mean 'safe'"),
        (("generate", "hi", "--dtype", "float17", "--model", "FOLDER"), "float17"),
        (("check", "policies:h20"), "did you mean 'h2o'"),
        (("check", "cheese"), "KIND:NAME"),
        (("inspect", "missing.safetensors"), "no such file"),
        (("config", "show", "nothing.toml"), "no such file"),
    ],
)
def test_errors_are_one_clear_message_and_exit_code_2(
    folder: Path, tmp_path: Path, arguments: tuple[str, ...], wanted: str
) -> None:
    result = run(*(folder if a == "FOLDER" else a for a in arguments))
    assert result.exit_code == 2, result.output
    assert wanted in result.stderr
    assert "Traceback" not in result.output


# --- what a command imports ---

LISTING = """
import sys, time
from fade_core.cli import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "matplotlib"} & set(sys.modules)
print(*sorted(heavy), time.process_time(), file=sys.stderr)
"""


def imported_by(*arguments: str) -> tuple[set[str], float]:
    """Heavy packages that ``fade ARGUMENTS`` imports in a process of its own, and the CPU seconds of that process."""
    command = [sys.executable, "-c", LISTING, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    *heavy, seconds = found.stderr.split()
    return set(heavy), float(seconds)


@pytest.mark.parametrize(
    "arguments", [("--version",), *((name, "--help") for name in COMMANDS), ("config", "validate", "--help")]
)
def test_what_needs_no_model_imports_no_torch(arguments: tuple[str, ...]) -> None:
    assert imported_by(*arguments)[0] == set()


def test_the_version_is_printed_at_once() -> None:
    assert min(imported_by("--version")[1] for _ in range(3)) < 0.3


@pytest.mark.slow
def test_listing_every_command_imports_neither_models_nor_plots() -> None:
    assert not {"transformers", "matplotlib"} & imported_by("--help")[0]


# --- generate ---


def test_generate_streams_what_the_model_says(folder: Path, small: Path) -> None:
    arguments = ("generate", TEXT, "--model", folder, "--max-new-tokens", 24, "--config")
    found = data(run(*arguments, small, "--json"))
    streamed = run(*arguments, small)
    assert ok(streamed).strip() == found["text"].strip()
    assert (found["prompt_tokens"], found["new_tokens"]) == (len(TEXT), 24)
    assert 0 < found["ratio"] < 0.5
    assert found["held_bytes"] == sum(found["tiers"].values())
    assert "tokens per second" in streamed.stderr
    exact = data(run(*arguments, "exact", "--json"))
    model, ids = tiny_llama(), torch.tensor([byte_tokenizer()(TEXT)["input_ids"]])
    wanted = model.generate(ids, max_new_tokens=24, do_sample=False)[0, len(TEXT) :]
    assert exact["text"] == byte_tokenizer().decode(wanted, skip_special_tokens=True)
    assert exact["held_bytes"] == 3 * 2 * (len(TEXT) + 23) * 2 * 16 * 4
    assert "ratio" not in exact


def test_generate_reads_files_and_samples_with_a_seed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text(TEXT, encoding="utf-8")
    arguments = ("generate", "--file", tmp_path / "prompt.txt", "--model", folder, "--max-new-tokens", 12, "--json")
    sampled = [data(run(*arguments, "--temperature", "1.5", "--seed", seed))["text"] for seed in (1, 1, 2)]
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
def test_what_config_show_prints_is_a_configuration(tmp_path: Path, format: str, preset: str) -> None:
    path = tmp_path / f"shown.{format}"
    path.write_text(ok(run("config", "show", preset, "--format", format)), encoding="utf-8")
    assert FadeConfig.from_file(path) == getattr(FadeConfig, preset)()
    assert str(path) in ok(run("config", "validate", path))


def test_config_list_tells_presets_apart() -> None:
    shown = json.loads(ok(run("config", "list", "--json")))["presets"]
    found = {preset["name"]: preset for preset in shown}
    assert found["safe"]["bits"] == pytest.approx(4 + 32 / 64 / 2 + 32 / 128 / 2)  # scales of 128 channels too
    assert found["safe"]["keeps"] == "all"
    assert found["aggressive"]["keeps"] == "0.5 (h2o)"
    assert all(preset["summary"] and preset["speed"] and preset["measured"] for preset in shown)
    kernels = {name.partition(":")[2] for name in default_registry().all("kernels")}
    assert all(preset["kernel"] in kernels and not preset["refused"] for preset in shown)
    plain = " ".join(ok(run("config", "list")).split())
    assert all(name in plain for name in found)


def test_config_list_tells_presets_of_several_tiers_and_those_that_cannot_be_used() -> None:
    ladder = [{"tier": "int4", "capacity": 0.25}, {"tier": "int2", "capacity": "rest"}]
    fields = {"ladder": ladder, "kernel": {"kind": "torch"}}

    class Brings:
        @staticmethod
        @hookimpl
        def fade_presets() -> list[Preset]:
            return [
                Preset("two-tiers", fields, "hot tokens at 4 bits", "in torch", "nowhere"),
                Preset("broken", {"keys": {"kind": "no-such-codes"}}, "asks for what is not there"),
            ]

    with use_registry(Registry([Brings()], entry_points=False)):
        found = {preset["name"]: preset for preset in data(run("config", "list", "--json"))["presets"]}
        shown = run("config", "list")
    assert found["two-tiers"]["bits"] is None
    assert [tier["tier"] for tier in found["two-tiers"]["tiers"]] == ["int4", "int2"]
    assert [tier["bits"] for tier in found["two-tiers"]["tiers"]] == [4.375, 2.375]  # scales of 128 channels too
    assert found["two-tiers"]["kernel"] == "torch"
    assert found["broken"]["bits"] is None
    assert "no-such-codes" in found["broken"]["refused"]
    assert "4.38, 2.38" in ok(shown)
    assert "broken cannot be used here: " in shown.stderr
    assert found["safe"]["bits"] is not None


def test_a_name_that_is_no_preset_is_explained() -> None:
    result = run("config", "show", "baanced")
    assert result.exit_code == 2
    assert "neither a preset nor a configuration file" in result.stderr
    assert "did you mean 'balanced'" in result.stderr


def test_config_validate_names_every_problem_of_every_file(tmp_path: Path, small: Path) -> None:
    (tmp_path / "typo.toml").write_text("recent_windw = 4\n")
    (tmp_path / "broken.json").write_text("{")
    result = run("config", "validate", tmp_path / "typo.toml", small, tmp_path / "broken.json")
    assert result.exit_code == 2
    assert "recent_window" in result.stderr
    assert "not valid JSON" in result.stderr
    assert f"{small}: valid" in result.stdout


def test_config_schema_is_json_schema(tmp_path: Path) -> None:
    schema = data(run("config", "schema"))
    assert {"keys", "policy", "ladder"} <= schema["properties"].keys()
    ok(run("config", "schema", "--output", tmp_path / "schema.json"))
    assert json.loads((tmp_path / "schema.json").read_text()) == schema


# --- plugins ---


class Broken:
    @staticmethod
    @hookimpl
    def fade_policies() -> list[Any]:
        raise RuntimeError("no policies today")


def test_plugins_are_listed_with_status_and_reason() -> None:
    with use_registry(Registry([Broken()], entry_points=False)):
        found = data(run("plugins", "--json"))
        shown = ok(run("plugins"))
    status = {plugin["dist"]: plugin for plugin in found["plugins"]}
    assert status["fade-core"]["status"] == "loaded"
    (broken,) = [plugin for name, plugin in status.items() if name != "fade-core"]
    assert broken["status"] == "failed"
    assert "no policies today" in broken["reason"]
    assert "no policies today" in shown
    kernels = {(kernel["op"], kernel["name"]): kernel for kernel in found["kernels"]}
    assert kernels["decode_attention", "torch"]["supported"]
    assert all(kernel["supported"] or kernel["reason"] for kernel in found["kernels"])


# --- inspect ---


def test_inspect_predicts_what_is_held(folder: Path, small: Path) -> None:
    found = data(run("inspect", "--model", folder, "--config", small, "--tokens", 100, "--tokens", 400, "--json"))
    assert (found["layers"], found["kv_heads"], found["head_dim"]) == (3, 2, 16)
    assert found["tiers"][0]["layers"] == "0-2"
    model = tiny_llama()
    for predicted in found["predicted"]:
        with torch.no_grad(), create_tiered_cache(model, FadeConfig.from_file(small)) as cache:
            model(torch.randint(0, 256, (1, predicted["tokens"])), past_key_values=cache)
            held = live_bytes(cache, exclude=model)
        assert predicted["total"] <= held <= 1.15 * predicted["total"]
        assert predicted["exact"] == 3 * 2 * predicted["tokens"] * 2 * 16 * 4
    assert "capacity" in ok(run("inspect", "--model", folder, "--config", "aggressive"))


def test_inspect_counts_what_is_evicted(folder: Path, evicting: Path) -> None:
    from fade_core.models.loading import load_skeleton

    skeleton = load_skeleton(folder)
    assert next(skeleton.parameters()).device.type == "meta"
    cache = create_tiered_cache(skeleton, FadeConfig.from_file(evicting))
    predicted = predict(cache.tiered, 400, skeleton)
    cache.detach()
    assert predicted.evicted > 0.4 * 400 * 3 * 2


def test_inspect_reads_saved_caches(small: Path, tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad(), create_tiered_cache(model, FadeConfig.from_file(small)) as cache:
        model(torch.randint(0, 256, (1, 90)), past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        cache.dump_debug(tmp_path / "cache.json")
    for name in ("cache.safetensors", "cache.json"):
        found = data(run("inspect", tmp_path / name, "--json"))
        assert (found["tokens"], found["layers"]) == (90, 3)
        assert FadeConfig(**found["config"]) == FadeConfig.from_file(small)
        assert "recent_window: 16" in ok(run("inspect", tmp_path / name))
    (tmp_path / "other.json").write_text("[]")
    for content in ('{"a": 1}', '{"fade_core": 1, "memory": [], "layers": {}, "config": {}}', "[]", "3"):
        (tmp_path / "other.json").write_text(content)
        assert "not what cache.dump_debug() writes" in run("inspect", tmp_path / "other.json").stderr
    (tmp_path / "other.json").write_text("[" * 100_000)
    assert "not a debug dump, which is JSON" in run("inspect", tmp_path / "other.json").stderr
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 100)
    assert "not a safetensors file" in run("inspect", tmp_path / "bad.safetensors").stderr


# --- prompts ---


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


def test_check_prints_results_and_fails_with_the_component() -> None:
    assert "passed" in ok(run("check", "policies:h2o", "--seed", 3))
    report = data(run("check", "quantizers:uniform", "--set", "bits=2", "--json"))
    assert report["ok"]

    class Failing:
        @staticmethod
        @hookimpl
        def fade_policies() -> list[Any]:
            from test_conformance_kit import NoisyConfig

            return [NoisyConfig]

    with use_registry(Registry([Failing()], entry_points=False)):
        result = run("check", "policies:noisy")
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


def whole(context: typer.Context) -> None:
    """The group alone."""
    if context.invoked_subcommand is None:
        typer.echo("all of it")


class Commands:
    @staticmethod
    @hookimpl
    def fade_commands(app: typer.Typer) -> None:
        for command in (hello, refuse, crash, impossible):
            app.command()(command)
        app.command("check")(hello)
        nested = typer.Typer()
        nested.command("one")(hello)
        nested.command("two")(refuse)
        app.add_typer(nested, name="nested")
        timing = typer.Typer()
        timing.command("hello")(hello)
        timing.command("twice")(refuse)
        app.add_typer(timing, name="bench")


class Timing:
    @staticmethod
    @hookimpl
    def fade_commands(app: typer.Typer) -> None:
        timing = typer.Typer()
        timing.callback(invoke_without_command=True)(whole)
        timing.command("twice")(hello)
        app.add_typer(timing, name="bench")
        app.add_typer(timing, name="nested")


class HalfWay:
    @staticmethod
    @hookimpl
    def fade_commands(app: typer.Typer) -> None:
        raise RuntimeError("no commands today")


def test_plugin_commands_join_and_cannot_break_the_host() -> None:
    with use_registry(Registry([Commands(), Timing(), HalfWay()], entry_points=False)):
        assert ok(run("hello", "--name", "there")).strip() == "hello there"
        assert ok(run("nested", "one")).strip() == "hello you"
        refused = run("refuse")
        assert refused.exit_code == 2
        assert "this plugin refuses" in refused.stderr
        assert run("nested", "two").exit_code == 2
        assert isinstance(run("crash").exception, RuntimeError)
        listed = run("--help")
        assert "Check a quantizer, policy" in ok(listed)  # the built-in check
        assert "'impossible' is left out" in listed.stderr
        for name in ("check", "nested", "twice"):
            assert f"'{name}' is left out: another command has that name" in listed.stderr
        assert "no commands today" in ok(run("plugins"))


def test_plugins_share_the_group_bench() -> None:
    """The plugin whose group runs without a sub-command is the host, whichever was found first."""
    for order in ([Commands(), Timing()], [Timing(), Commands()]):
        with use_registry(Registry(order, entry_points=False)):
            assert ok(run("bench")).strip() == "all of it"
            assert ok(run("bench", "hello")).strip() == "hello you"
            assert ok(run("bench", "twice")).strip() == "hello you"


def test_a_command_of_a_plugin_that_is_not_here_says_what_to_install() -> None:
    with use_registry(Registry(entry_points=False)):
        found = run("demo", "--model", "tiny")
        assert found.exit_code == 2
        assert "fade-eval brings `fade demo`: pip install fade-eval" in found.stderr
        assert "Did you mean 'generate'" in run("generat").stderr

    def fade_commands(app: typer.Typer) -> None:
        raise RuntimeError("no commands today")

    with use_registry(Registry([plugin("fade_eval", fade_commands)], entry_points=False)):
        assert (
            "does not work here: fade_commands raised RuntimeError: no commands today" in run("eval", "needle").stderr
        )


# --- measuring, which is a distribution of its own ---


def test_without_it_the_name_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fade_eval", None)
    with pytest.raises(ImportError, match=r"fade_core.eval.perplexity comes with fade-eval: pip install fade-eval"):
        from fade_core.eval import perplexity  # noqa: F401 (refused)
    assert not hasattr(fade_eval_alias, "__wrapped__")


def test_what_it_lacks_itself_is_not_mistaken_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delitem(sys.modules, "fade_eval", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fade_eval.py").write_text("import missing_from_here", encoding="utf-8")
    with pytest.raises(ModuleNotFoundError, match="missing_from_here"):
        _ = fade_eval_alias.needle


def test_sizes_are_for_people() -> None:
    assert [size(n) for n in (12, 1500, 2_340_000, 5e9)] == ["12 B", "1.5 kB", "2.3 MB", "5.0 GB"]
