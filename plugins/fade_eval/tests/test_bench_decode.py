"""``fade bench decode``: what it measures, what it tells, and what is left of it when it is interrupted."""

from __future__ import annotations

import functools
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commandline import data, ok, run

from fade_core import FadeConfig, decode_loop
from fade_core.config.kernel_selection import KernelSelection, choose_kernel
from fade_core.errors import InputError
from fade_eval import generating, profiling
from fade_eval.cli import benchdecode
from fade_eval.generating import (
    DYNAMIC,
    FIXED,
    GROWING,
    GROWING_RECORDED,
    RECORDED,
    STATIC,
    Comparison,
    GenerateTime,
    Measured,
    Runs,
    Work,
    generate_times,
)
from fade_eval.profiling import PROFILED, Kernels, covered
from fade_eval.shapes import SHAPES, check_shape, random_model, weights

CPU = torch.device("cpu")
TINY = ("bench", "decode", "--device", "cpu", "--shape", "tiny", "--context", 140, "--steps", 4, "--warmup", 2)
TWO = ("--config", "safe", "--config", "balanced")


def listed(stdout: str) -> list[str]:
    """What the first column of tables names."""
    return [line.split("│")[1].strip() for line in stdout.splitlines() if line.startswith("│")]


@pytest.fixture
def _shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling a second layer takes as long again and says nothing more."""
    monkeypatch.setitem(SHAPES["tiny"], "num_hidden_layers", 1)


# --- shapes ---


@pytest.mark.parametrize(
    ("shape", "billions", "layers", "heads", "kv_heads", "head_dim", "bias"),
    [
        ("llama-3.1-8b", 8.03, 32, 32, 8, 128, False),
        ("qwen2.5-7b", 7.62, 28, 28, 4, 128, True),
        ("qwen2.5-0.5b", 0.494, 24, 14, 2, 64, True),
        ("gemma3-4b", 3.88, 34, 8, 4, 256, False),
    ],
)
def test_shapes_have_the_published_sizes(
    shape: str, billions: float, layers: int, heads: int, kv_heads: int, head_dim: int, bias: bool
) -> None:
    assert weights(shape) / 1e9 == pytest.approx(billions, rel=1e-3)
    with torch.device("meta"):
        attention = random_layer(shape)
    config = attention.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (
        layers,
        heads,
        kv_heads,
    )
    assert attention.head_dim == head_dim
    assert (attention.q_proj.bias is not None, attention.o_proj.bias is not None) == (bias, False)
    full = [kind for kind in getattr(config, "layer_types", None) or () if kind == "full_attention"]
    assert len(full) == {"gemma3-4b": 5, "llama-3.1-8b": 0}.get(shape, layers)  # Llama's names no kinds


def random_layer(shape: str) -> Any:
    """The attention of a model's first layer."""
    from fade_eval.shapes import _made

    return _made(shape, torch.device("meta")).model.layers[0].self_attn


def test_weights_come_from_the_seed_and_nothing_else() -> None:
    seed, before = random.randrange(2**31), torch.get_rng_state()
    one, other = (random_model("tiny", CPU, seed).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], random_model("tiny", CPU, seed + 1).state_dict()["lm_head.weight"])


def test_without_a_gpu_large_shapes_are_refused_before_anything_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fade_eval.shapes.random_model", lambda *_: pytest.fail("a model was made"))
    refused = run("bench", "decode", "--device", "cpu", "--shape", "tiny", "--shape", "qwen2.5-7b")
    assert refused.exit_code == 2
    for words in ("qwen2.5-7b needs a GPU", "7.6 billion weights take 15.2 GB in bfloat16", "--shape tiny works"):
        assert words in refused.stderr
    assert "unknown shape 'huge'; there are llama-3.1-8b, qwen2.5-7b" in run(*TINY[:5], "huge").stderr
    check_shape("qwen2.5-7b", torch.device("cuda"))  # says nothing


def test_bench_batch_counts_rows_of_full_layers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    mixed = SHAPES["gemma3-4b"] | {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16}
    monkeypatch.setitem(SHAPES, "tiny", mixed | small)
    refused = run("bench", "batch", "--device", "cpu", "--shape", "tiny")
    assert refused.exit_code == 2
    assert "sliding_attention holds no whole context" in refused.stderr


# --- generate ---


@pytest.mark.slow
@pytest.mark.usefixtures("_shallow")
def test_times_what_is_the_same(tmp_path: Path) -> None:
    seed = random.randrange(2**31)
    found = data(run(*TINY, "--seed", seed, "--output-dir", tmp_path, "--json"))
    attention, _ = choose_kernel("decode_attention", KernelSelection(), None, 64, CPU, torch.float32)
    (result,) = found["results"]
    assert found["missing"] == []
    assert result["theirs"] < 1e-5
    assert list(result["times"]) == ["DynamicCache", "StaticCache, compiled"]
    assert list(result["configs"]) == ["safe"]
    safe = result["configs"]["safe"]
    assert safe["green"]
    assert safe["ours"] < 1e-5
    assert safe["graphs"] == 0
    assert safe["times"]["FADE, compiled"]["kernels"] == f"torch, {attention.name}"
    for time in (*result["times"].values(), *safe["times"].values()):
        assert 0 < time["ms"] <= time["ms_longest"]
        assert time["prefill_ms"] > 0
        assert time["busy_ms"] is None
        assert time["shares"] == {}
    assert json.loads((tmp_path / "decode.json").read_text()) == found
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")
    shown = ok(run(*TINY, "--seed", seed, "--output-dir", tmp_path))  # nothing is left to be measured
    assert listed(shown) == ["DynamicCache", "StaticCache, compiled", "safe", "safe, compiled"]
    assert "parity: safe, compiled," in shown
    assert "GPU-busy time is left out: there is no GPU" in shown


def test_sliding_layers_and_a_loop_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "sliding_window": 24}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["gemma3-4b"] | small | layers)
    ran = Counter[str]()

    def loop(model: Any, *args: Any, **kwargs: Any) -> Any:
        ran[type(kwargs["past_key_values"]).__name__] += 1
        return type(model)._sample(model, *args, **kwargs)

    config = FadeConfig(n_sink=2, recent_window=16, tile=16, keys={"kind": "uniform", "bits": 8})
    model = random_model("tiny", CPU, random.randrange(2**31))
    runs = Runs(model, Work(batch=2, context=90, steps=6, warmup=2, checked=8), custom_generate=loop)
    assert runs.refusal(config) == ""
    exact, ours = runs.measured(DYNAMIC), runs.measured(GROWING_RECORDED, config)
    assert ran == {"TieredKVCache": 1}
    assert 0 < generating.distance(ours.logits, exact.logits) < 0.05
    assert ours.time.held_bytes < exact.time.held_bytes


def test_fades_own_loop_is_timed_growing_and_not() -> None:
    model = random_model("tiny", CPU, random.randrange(2**31))
    own = functools.partial(decode_loop, record=True)
    runs = Runs(model, Work(batch=2, context=140, steps=6, warmup=3, checked=9), custom_generate=own)
    found = runs.ours(Comparison("tiny", 2, 140, 6, theirs=0.0), "safe", FadeConfig.safe()).configs["safe"]
    assert list(found.times) == [GROWING, RECORDED, GROWING_RECORDED]
    assert found.green


def test_what_does_not_compile_is_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "stock.toml").write_text('attention = "stock"')
    refused = run(*TINY, "--config", tmp_path / "stock.toml")
    assert refused.exit_code == 1
    assert "cannot be compiled: layer 0: the model keeps its own attention" in refused.stderr
    assert not listed(refused.stdout)  # measured for nobody
    if not torch.cuda.is_available():
        assert "on a GPU only" in run(*TINY, "--profile").stderr


# --- profiles ---


class Profiler:
    """Stands for torch's: each profile sees the kernels of the next entry in ``steps``."""

    def __init__(self, steps: list[list[tuple[str, float, float]]], started: Callable[[], None] = lambda: None) -> None:
        self.steps, self.started, self.running = steps, started, False

    def __call__(self, **_: Any) -> Profiler:
        return self

    def start(self) -> None:
        assert not self.running
        self.running = True
        self.started()

    def stop(self) -> None:
        assert self.running
        self.running = False

    def events(self) -> list[Any]:
        return [
            SimpleNamespace(
                name=name.removeprefix("host ").removeprefix("note "),
                device_type=SimpleNamespace(name="CPU" if name.startswith("host ") else "CUDA"),
                is_user_annotation=name.startswith("note "),
                time_range=SimpleNamespace(start=start, end=end),
            )
            for name, start, end in self.steps.pop(0)
        ]


def test_the_median_step_counts_each_moment_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = [
        ("decode_kernel", 0.0, 300.0), ("merge_kernel", 200.0, 400.0), ("gemm", 900.0, 1500.0),
        ("append_planes_kernel", 1500.0, 1600.0), ("host cudaLaunchKernel", 0.0, 9000.0), ("note region", 0.0, 9000.0),
    ]  # fmt: skip
    ranking = [("mass_kernel", 0.0, 50_000.0)]
    monkeypatch.setattr(torch.profiler, "profile", Profiler([plain, ranking, plain, [], plain]))
    kernels = Kernels(7)
    assert sorted(kernels.at) == [7, 8, 9, 10, 11, 12]
    for token in sorted(kernels.at):
        kernels.at[token]()
    assert kernels.busy_ms == pytest.approx(0.4 + 0.6 + 0.1)
    whole = 3 * 1200 + 50_000
    assert kernels.shares == pytest.approx(
        {"append": 300 / whole, "attention": 1500 / whole, "encode": 0, "mass": 50_000 / whole, "other": 1800 / whole}
    )


def test_a_profiler_that_sees_nothing_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.profiler, "profile", Profiler([[] for _ in range(PROFILED)]))
    kernels = Kernels(0)
    for token in sorted(kernels.at):
        kernels.at[token]()
    assert kernels.busy_ms is None
    assert kernels.shares == {}
    assert Kernels(None).at == {}


def test_covered() -> None:
    assert covered([]) == 0
    assert covered([(5.0, 6.0), (0.0, 2.0), (1.0, 4.0), (1.5, 2.0), (6.0, 6.5)]) == 5.5


@pytest.mark.usefixtures("_shallow")
def test_profiles_cost_no_timed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def tick(seconds: float = 1e-3) -> float:
        now[0] += seconds
        return now[0]

    busy = [("decode_kernel", 0.0, 250.0)]
    monkeypatch.setattr(torch.profiler, "profile", Profiler([busy] * PROFILED, started=lambda: tick(5.0) and None))
    monkeypatch.setattr(generating, "time", SimpleNamespace(perf_counter=tick))
    model = random_model("tiny", CPU, random.randrange(2**31))
    work = Work(batch=2, context=20, steps=4, warmup=2, checked=6, profile=True)
    found = Runs(model, work).measured(GROWING, FadeConfig())
    assert found.time.ms_longest == pytest.approx(1.0)
    assert found.time.warmup_ms == pytest.approx(2.0)
    assert found.time.busy_ms == 0.25
    assert found.time.shares["attention"] == 1
    assert found.logits.shape == (6, 2, 256)


# --- the record: nothing is generated ---


class Generated:
    """In place of ``Runs.measured``: notes who was asked for, and does what ``then`` says before it answers."""

    def __init__(self, red: tuple[str, ...] = ()) -> None:
        self.asked, self.red = list[str](), red
        self.then: Callable[[str], object] = lambda name: None

    def __call__(self, name: str, config: FadeConfig | None = None) -> Measured:
        preset = "" if config is None else {4: "safe ", 3: "balanced "}[config.keys.model_dump()["bits"]]
        self.then(preset + name)
        self.asked.append(preset + name)
        logits = torch.ones(3, 1, 8)
        logits[0, 0, 0] += {STATIC: 0.01, FIXED: 0.5 if preset.strip() in self.red else 0.015}.get(name, 0.0)
        time = GenerateTime(float(len(self.asked)), 2.0, 3.0, 4.0, 5.0, 600, busy_ms=0.5 * len(self.asked))
        return Measured(time, logits, 0)


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> Generated:
    found = Generated()
    monkeypatch.setattr(Runs, "measured", lambda self, *args: found(*args))
    monkeypatch.setattr(Runs, "start_up", lambda *_: None)
    monkeypatch.setattr(benchdecode, "draw", lambda *_: None)  # takes longer than all the rest
    return found


def test_transformers_caches_are_measured_once_a_point(generated: Generated, tmp_path: Path) -> None:
    points = ("--batch", 1, "--batch", 2, "--context", 70)
    found = data(run(*TINY, *TWO, *points, "--output-dir", tmp_path, "--json"))
    assert [(one["shape"], one["batch"], one["context"]) for one in found["results"]] == [
        ("tiny", 1, 140), ("tiny", 1, 70), ("tiny", 2, 140), ("tiny", 2, 70),
    ]  # fmt: skip
    assert Counter(generated.asked) == dict.fromkeys(
        (DYNAMIC, STATIC, f"safe {GROWING}", f"safe {FIXED}", f"balanced {GROWING}", f"balanced {FIXED}"), 4
    )
    shown = ok(run(*TINY, *TWO, *points, "--output-dir", tmp_path))
    assert listed(shown) == 4 * [DYNAMIC, STATIC, "safe", "safe, compiled", "balanced", "balanced, compiled"]
    assert len(generated.asked) == 24  # it was all there


def test_no_time_is_told_where_parity_is_red(generated: Generated, tmp_path: Path) -> None:
    generated.red = ("balanced",)
    shown = run(*TINY, *TWO, "--output-dir", tmp_path)
    assert shown.exit_code == 1
    gap, theirs = (float(delta / torch.tensor(24.0).sqrt()) for delta in (torch.tensor(0.5), torch.tensor(0.01)))
    parity = f"parity: balanced, compiled, {gap:.2e} from balanced as it is, StaticCache {theirs:.2e} from DynamicCache"
    assert parity in shown.stdout
    assert "balanced, compiled, computes something else: no time of it is worth printing" in shown.stderr
    assert listed(shown.stdout) == [DYNAMIC, STATIC, "safe", "safe, compiled"]
    (held,) = json.loads((tmp_path / "decode.json").read_text())["results"]
    assert held["configs"]["balanced"]["times"] == {}
    assert held["configs"]["safe"]["times"]["FADE, compiled"]["ms"] == 4
    assert run(*TINY, *TWO, "--output-dir", tmp_path).exit_code == 1  # still red, and not measured again
    assert len(generated.asked) == 6


def test_what_was_measured_survives_and_is_gone_on_with(generated: Generated, tmp_path: Path) -> None:
    """Stopped before each call in turn: what the file holds then, and that the last start measures the rest only."""
    file = tmp_path / "decode.json"
    held = list[tuple[int, int, int]]()

    def stop(name: str) -> None:
        if len(generated.asked) == stopped_at:
            if file.exists():
                now = json.loads(file.read_text())
                one = now["results"][0]
                held.append((len(one["times"]), len(one["configs"]), len(now["missing"])))
            raise KeyboardInterrupt

    for stopped_at in (0, 1, 2, 3, 4, 5, 6):
        generated.asked.clear()
        file.unlink(missing_ok=True)
        generated.then = stop
        result = run(*TINY, *TWO, "--output-dir", tmp_path)
        if stopped_at < 6:
            assert result.exit_code == 130
            assert f"interrupted; the same command goes on from {file}" in result.stderr
            assert (DYNAMIC in listed(result.stdout)) == (stopped_at > 0)
            assert ("safe, compiled" in listed(result.stdout)) == (stopped_at > 3)
        generated.then = lambda name: None
        generated.asked.clear()
        ok(run(*TINY, *TWO, "--output-dir", tmp_path))
        # a cache whose partner in parity was not measured is measured again
        assert len(generated.asked) == {0: 6, 1: 6, 2: 4, 3: 4, 4: 2, 5: 2, 6: 0}[stopped_at]
    #       transformers' caches, configurations, missing
    assert held == [(1, 0, 3), (2, 0, 2), (2, 0, 2), (2, 1, 1), (2, 1, 1)]
    assert not list(tmp_path.glob("*.part"))
    whole = json.loads(file.read_text())
    assert whole["missing"] == []
    assert list(whole["results"][0]["configs"]) == ["safe", "balanced"]


def test_what_is_missing_is_named(generated: Generated, tmp_path: Path) -> None:
    def full(name: str) -> None:
        if name == f"balanced {FIXED}":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
        if generated.asked.count(DYNAMIC) == 2 and name == STATIC:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB.")

    generated.then = full
    shown = run(*TINY, *TWO, "--batch", 1, "--batch", 8, "--output-dir", tmp_path)
    assert shown.exit_code == 1
    assert listed(shown.stdout) == [DYNAMIC, STATIC, "safe", "safe, compiled", DYNAMIC]
    assert json.loads((tmp_path / "decode.json").read_text())["missing"] == [
        "tiny, 1 x 140: balanced (left out: CUDA out of memory)",
        "tiny, 8 x 140: StaticCache, compiled (left out: CUDA out of memory)",
        "tiny, 8 x 140: safe",  # nobody to compare its distance with
        "tiny, 8 x 140: balanced",
    ]
    assert "missing: tiny, 1 x 140: balanced (left out: CUDA out of memory)" in shown.stderr
    generated.then = lambda name: None
    ok(run(*TINY, *TWO, "--batch", 1, "--batch", 8, "--output-dir", tmp_path))  # tried again, with more memory


@pytest.mark.usefixtures("generated")
def test_a_record_of_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    FadeConfig().to_file(mine)
    command = (*TINY, "--config", mine, "--output-dir", tmp_path / "out")
    ok(run(*command))
    before = (tmp_path / "out" / "decode.json").read_text()
    for other, words in (
        (("--steps", 5), "steps was 4 and is 5"),
        (("--batch", 2), "batch was [1] and is [2]"),
        (("--config", "safe"), "config was mine and is mine, safe"),
        (("--kernel", "torch"), "config mine means something else now; kernel was auto and is torch"),
    ):
        refused = run(*command, *other)
        assert refused.exit_code == 2
        assert words in refused.stderr
    FadeConfig(n_sink=5).to_file(mine)
    assert "config mine means something else now" in run(*command).stderr
    assert (tmp_path / "out" / "decode.json").read_text() == before
    (tmp_path / "out" / "decode.json").write_text('{"results": []}')
    refused = run(*command)
    assert refused.exit_code == 2
    assert "decode.json cannot be gone on from: KeyError: 'settings'" in refused.stderr


def test_profiled_times_stand_beside_wall_times(generated: Generated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "can_profile", lambda device: True)
    monkeypatch.setattr(generating, "can_profile", lambda device: True)
    shown = ok(run(*TINY, "--config", "safe"))
    assert "GPU busy" in shown
    assert "│ safe, compiled        │ 4.00 │     2.00 │" in shown
    assert "left out" not in shown
    assert generated.asked == [DYNAMIC, STATIC, f"safe {GROWING}", f"safe {FIXED}"]


@pytest.mark.parametrize("name", ["batch", "context", "steps", "warmup"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=name):
        generate_times(None, {}, **{name: 0})  # type: ignore[arg-type]
