"""``fade bench kernels`` and ``fade bench tune``, with a made-up clock where a GPU would be timed."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from oracle import seed
from typer.testing import CliRunner

from fade_core.cli.app import build_app
from fade_core.errors import ConfigError, InputError
from fade_kernels_triton import config as config_module
from fade_kernels_triton import decode, device
from fade_kernels_triton.bench import cases as cases_module
from fade_kernels_triton.bench import commands, problems, session, tuning
from fade_kernels_triton.bench.agreement import Agreement
from fade_kernels_triton.bench.baselines import Baseline
from fade_kernels_triton.bench.cases import SHAPES, TIMED, Case
from fade_kernels_triton.bench.report import Check, Machine, Note, Search, Timing, TimingReport, TuningReport, short
from fade_kernels_triton.bench.session import Session, check_formats, time_kernels
from fade_kernels_triton.bench.timing import Budget
from fade_kernels_triton.bench.tuned import TunedFile
from fade_kernels_triton.bench.tuning import candidates, search, tune
from fade_kernels_triton.config import VARIABLE, lookup, own, shipped
from fade_kernels_triton.configfile import ConfigFile, read_file, user_file, write_file
from fade_kernels_triton.launch import DecodeConfig

GPU = "Fast 9000"
TINY = Case(1, 2, 1, 64, 128)
TOKEN = replace(TINY, axis="token")
WIDE = Case(1, 2, 1, 128, 128)
MACHINE = Machine(GPU, "2.9", "3.6", 2.5, 7)
BF16 = Baseline("1x128 2/1 d64", 8 * 10**6, {"flash": 12.0, "flex": 8.0}, {"cudnn": "RuntimeError: [no] kernel"})


@pytest.fixture(autouse=True)
def user(monkeypatch, tmp_path):
    """A user without files, and no file read before."""
    for cached in (lookup, own):
        cached.cache_clear()
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COLUMNS", "250")
    yield
    for cached in (lookup, own):
        cached.cache_clear()


@pytest.fixture
def where(device):
    return torch.device(device)


class Clock:
    """A timer: 10 us a call, or what was said for a launch configuration or a kind of call; each is really made once."""

    def __init__(self, **by_launch: float) -> None:
        self.by_launch, self.replays = by_launch, []

    def __call__(self, calls, replays):
        calls[0]()
        config = next((a for a in getattr(calls[0], "args", ()) if isinstance(a, DecodeConfig)), None)
        self.replays.append((config and short(config), replays))
        return self.by_launch.get(short(config) if config else "baseline", 10.0)


def session_of(where, timer=None, budget=None, contenders=None, number=None):
    flash = {"flash": lambda: lambda q, k, v: q}
    number = seed() if number is None else number
    return Session(where, number, lambda *_: None, budget or Budget(), timer or Clock(), contenders or flash)


class Steps:
    """A clock that moves by one each time a budget looks at it."""

    def __init__(self) -> None:
        self.now = -1.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


def spoilt(monkeypatch, which):
    """Let the kernel compute nonsense where ``which(case-bits-and-axis, config)`` says so."""

    def attention(query, tiers, window, *, config):
        output, lse = decode.decode_attention(query, tiers, window, config=config)
        return (output * 2 if which(tiers[0].key_format, config) else output), lse

    monkeypatch.setattr(problems, "decode_attention", attention)


# --- a run of fade bench kernels ---


def test_kernels_are_checked_and_timed_beside_the_fastest_baseline(where):
    report = TimingReport(MACHINE)
    contenders = {"slow": lambda: lambda q, k, v: q, "none": lambda: 1 / 0}
    made = session_of(where, Clock(baseline=30.0), contenders=contenders)
    red = check_formats([TINY, TOKEN], made, report)
    time_kernels([TINY, TOKEN, WIDE], red, made, report)
    assert red == {}
    assert report.ok
    assert [one.shape for one in report.baselines] == [TINY.shape, WIDE.shape]  # once a shape
    assert [(t.case, t.us, t.ratio) for t in report.timings] == [(c.name, 10.0, 3.0) for c in (TINY, TOKEN, WIDE)]
    assert "ZeroDivisionError" in report.baselines[0].troubles["none"]
    assert [t.table_us for t in report.timings] == [10.0] * 3
    own = [name for c in (TINY, TOKEN, WIDE) for name in (c.name, replace(c, table=True).name)]
    assert [check.case for check in report.checks] == [*(c.name for c in (TINY, TINY, TOKEN, TOKEN)), *own]
    assert report.timings[0].config == lookup(TINY.launch, where)
    assert report.checks[-1].config == report.timings[-1].config  # what is timed is what was checked
    assert report.timings[0].tb_s == pytest.approx(report.timings[0].nbytes / 10e6)


def test_formats_whose_parity_is_red_are_not_timed(monkeypatch, where):
    spoilt(monkeypatch, lambda fmt, config: fmt.axis == "token" and config.resident == 2)
    report, made = TimingReport(MACHINE), session_of(where)
    red = check_formats([TINY, TOKEN], made, report)
    time_kernels([TINY, TOKEN], red, made, report)
    assert red == {TOKEN.format: TOKEN.name}
    assert [check.green for check in report.checks[:4]] == [True, True, True, False]
    assert [timing.case for timing in report.timings] == [TINY.name]
    assert report.skipped == [Note(TOKEN.name, f"parity is red: {TOKEN.name}")]
    assert not report.ok


def test_a_case_whose_own_parity_is_red_is_not_timed(monkeypatch, where):
    spoilt(monkeypatch, lambda fmt, config: True)
    report = TimingReport(MACHINE)
    time_kernels([TINY], {}, session_of(where), report)
    assert (report.timings, report.ok) == ([], False)
    assert report.skipped == [Note(TINY.name, "parity is red: its own")]


def test_what_raises_is_named_and_the_rest_goes_on(monkeypatch, where):
    broken = replace(TINY, dim=72)
    report, made = TimingReport(MACHINE), session_of(where)
    assert check_formats([replace(broken, bits=2)], made, report) == {"int2-channel-64": replace(broken, bits=2).name}
    assert "72" in report.checks[0].trouble
    time_kernels([broken, TINY], {}, made, report)
    assert [note.what for note in report.failures] == [broken.name]
    assert [timing.case for timing in report.timings] == [TINY.name]
    assert not report.ok


def test_what_does_not_fit_the_budget_is_named(where):
    report = TimingReport(MACHINE)
    made = session_of(where, budget=Budget(2.5, Steps()))
    red = check_formats([TINY, TOKEN], made, report)  # at 1 and 2
    time_kernels([TINY, TOKEN], red, made, report)
    assert [note.what for note in report.skipped] == [TINY.name, TOKEN.name]
    assert {note.why for note in report.skipped} == {session.OUT_OF_TIME}
    assert len(report.checks) == 4
    late = TimingReport(MACHINE)
    check_formats([TINY], session_of(where, budget=Budget(0.5, Steps())), late)
    assert [note.what for note in late.skipped] == [f"parity: {TINY.name}"]


# --- a run of fade bench tune ---


def test_candidates_are_distinct_and_know_the_gpu():
    for case in TIMED:
        found = list(candidates(case, overlap=True))
        assert len(set(found)) == len(found) > 25
        assert DecodeConfig() in found
        without = list(candidates(case, overlap=False))
        assert not any(config.overlap for config in without)
        assert {replace(config, overlap=False) for config in found} == set(without) > set()
    few, many = (list(candidates(shape, overlap=True)) for shape in (SHAPES[1], SHAPES[0]))
    assert min(config.resident for config in few) == 1 < min(config.resident for config in many)


def test_every_shipped_configuration_is_a_candidate():
    by_launch = {case.launch: case for case in TIMED}
    for launch, config in shipped().decode:
        assert config in set(candidates(by_launch[launch], overlap=True))


def test_the_fastest_right_configuration_is_kept(monkeypatch, where):
    spoilt(monkeypatch, lambda fmt, config: config.stages == 4)
    in_use, fast, wrong, broken = DecodeConfig(), DecodeConfig(2), DecodeConfig(stages=4), DecodeConfig(resident=99)
    clock = Clock(w1s3r8=20.0, w2s3r8=12.0, w1s4r8=3.0)
    timed = Clock.__call__

    def picky(self, calls, replays):
        if calls[0].args[0] == broken:
            raise ValueError("too\nmuch")
        return timed(self, calls, replays)

    monkeypatch.setattr(Clock, "__call__", picky)
    found, check = search(TINY, [in_use, broken, wrong, fast], session_of(where, clock))
    assert found.before == (in_use, 20.0)
    assert found.best == (fast, 12.0)
    assert found.tried == {in_use: 20.0, wrong: 3.0, fast: 12.0}
    assert found.troubles == {broken: "ValueError: too", wrong: "what it computes is wrong"}
    assert (check.config, check.green) == (fast, True)
    assert clock.replays[-2:] == [("w1s3r8", session.REPLAYS), ("w2s3r8", session.REPLAYS)]


def test_the_configuration_in_use_is_kept_where_a_second_look_finds_it_faster(where):
    in_use, lucky = DecodeConfig(), DecodeConfig(2)
    times = {(in_use, tuning.SEARCH_REPLAYS): 10.0, (lucky, tuning.SEARCH_REPLAYS): 9.0, (lucky, session.REPLAYS): 11.0}
    made = session_of(where, lambda calls, replays: times.get((calls[0].args[0], replays), 10.0))
    found, check = search(TINY, [in_use, lucky], made)
    assert found.best == found.before == (in_use, 10.0)
    assert check.config == in_use


def test_a_search_without_a_right_answer_says_so(monkeypatch, where):
    def never(calls, replays):
        raise ValueError("no launch")

    with pytest.raises(RuntimeError, match="no configuration runs; the one in use says ValueError: no launch"):
        search(TINY, [DecodeConfig()], session_of(where, never))
    spoilt(monkeypatch, lambda fmt, config: True)
    with pytest.raises(RuntimeError, match="no configuration that runs computes the case right"):
        search(TINY, [DecodeConfig()], session_of(where))


@pytest.mark.slow
def test_tuning_keeps_each_row_at_once_and_names_what_is_left(monkeypatch, where):
    kept = {}
    report = TuningReport(MACHINE)
    made = session_of(where, Clock(w2s3r3=1.0))
    broken = replace(TINY, dim=72)
    red = {"int4-token-64": "x"}
    tune([TINY, TOKEN, broken], red, False, made, report, lambda case, config: kept.update({case: config}))
    assert kept == {TINY.launch: DecodeConfig(2, 3, 3)}
    assert report.skipped == [Note(TOKEN.name, "parity is red: x")]
    assert [note.what for note in report.failures] == [broken.name]
    assert [one.case for one in report.searches] == [TINY.name]
    assert next(iter(report.searches[0].tried)) == lookup(TINY.launch, where)


def test_a_search_that_is_cut_short_keeps_its_best_and_says_so(where):
    kept = {}
    report = TuningReport(MACHINE)
    made = session_of(where, budget=Budget(3.5, Steps()))  # looked at before the case, then before all but its first
    tune([TINY, WIDE], {}, False, made, report, lambda case, config: kept.update({case: config}))
    total = len(tuning.tried_for(TINY, where, overlap=False))
    assert len(report.searches[0].tried) == 3
    assert list(kept) == [TINY.launch]
    cut = Note(f"{TINY.name}: {total - 3} of {total} configurations", session.OUT_OF_TIME)
    assert report.skipped == [cut, Note(WIDE.name, session.OUT_OF_TIME)]


# --- the file ---


def test_tuned_rows_join_those_that_the_file_has_and_fade_reads_them(monkeypatch):
    other = (WIDE.launch, DecodeConfig(4))
    write_file(user_file(GPU), ConfigFile(GPU, (other, (TINY.launch, DecodeConfig()))))
    tuned = TunedFile(None, GPU)
    tuned.keep(TINY.launch, DecodeConfig(2))
    assert read_file(user_file(GPU)).decode == (other, (TINY.launch, DecodeConfig(2)))
    assert tuned.advice() == f"written: {user_file(GPU)}; FADE reads it from now on"
    monkeypatch.setattr(config_module, "gpu_name", lambda device: GPU)
    monkeypatch.setattr(config_module, "overlaps", lambda device: True)
    assert lookup(TINY.launch, torch.device("cuda", 0)) == DecodeConfig(2)


def test_a_file_elsewhere_is_read_if_the_variable_names_it(monkeypatch, tmp_path):
    path = tmp_path / "mine.json"
    tuned = TunedFile(path, GPU)
    assert f"FADE reads {user_file(GPU)} until {VARIABLE}={path} is set" in tuned.advice()
    monkeypatch.setenv(VARIABLE, str(path))
    assert tuned.advice().endswith("FADE reads it from now on")


def test_files_that_cannot_be_added_to_are_refused_before_anything_is_timed(tmp_path):
    write_file(tmp_path / "other.json", ConfigFile("Slow 1", ()))
    with pytest.raises(ConfigError, match=r"other\.json are of 'Slow 1', and this GPU is 'Fast 9000'.*--output"):
        TunedFile(tmp_path / "other.json", GPU)
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"bad\.json holds"):
        TunedFile(tmp_path / "bad.json", GPU)
    with pytest.raises(ConfigError, match="cannot be written"):
        TunedFile(tmp_path / "bad.json" / "x.json", GPU)


# --- reports ---


def made_up() -> TimingReport:
    green, red = Agreement(1e-3, 4e-3, 0.5), Agreement(float("inf"), 4e-3, float("inf"))
    config = DecodeConfig(overlap=True, registers=168)
    return TimingReport(
        MACHINE,
        checks=[
            Check("case a", config, green),
            Check("case b", config, red),
            Check("case c", config, None, "Oops: no"),
        ],
        skipped=[Note("case d", "the budget was spent")],
        baselines=[BF16],
        timings=[
            Timing("case a", 4.0, 2 * 10**6, config, BF16, 5.0),
            Timing("case e", 4.0, 2 * 10**6, config, replace(BF16, us={})),
        ],
    )


def test_json_of_a_report():
    data = json.loads(json.dumps(made_up().to_dict(), allow_nan=False))
    assert data["machine"] == {"gpu": GPU, "torch": "2.9", "triton": "3.6", "copy_tb_s": 2.5, "seed": 7}
    assert [check["green"] for check in data["checks"]] == [True, False, False]
    assert (data["checks"][1]["error"], data["checks"][2]["trouble"]) == (None, "Oops: no")
    assert data["baselines"] == [
        {
            "shape": BF16.shape, "us": {"flash": 12.0, "flex": 8.0}, "best": "flex", "tb_s": 1.0,
            "did_not_run": {"cudnn": "RuntimeError: [no] kernel"},
        }
    ]  # fmt: skip
    first, second = data["timings"]
    assert (first["times_faster"], first["than"], first["tb_s"], first["us"]) == (2.0, "flex", 0.5, 4.0)
    assert DecodeConfig(**first["config"]) == DecodeConfig(overlap=True, registers=168)
    assert (second["times_faster"], second["than"]) == (None, None)
    assert (first["table_us"], first["table_to_flat"], second["table_us"], second["table_to_flat"]) == (
        5.0,
        1.25,
        None,
        None,
    )
    assert data["skipped"] == [{"what": "case d", "why": "the budget was spent"}]


def test_json_of_a_search():
    config = DecodeConfig(2)
    found = Search("a", TINY.launch, (DecodeConfig(), None), (config, 3.0), {config: 3.0}, {DecodeConfig(): "Oops"})
    data = json.loads(json.dumps(TuningReport(MACHINE, searches=[found]).to_dict(), allow_nan=False))["searches"][0]
    assert data["before"]["us"] is None
    assert DecodeConfig(**data["best"]["config"]) == config
    assert (data["tried"], data["troubles"]) == ({"w2s3r8": 3.0}, {"w1s3r8": "Oops"})


@pytest.mark.parametrize(
    ("changes", "ok"),
    [
        ({}, True),
        ({"timings": []}, False),
        ({"failures": [Note("a", "b")]}, False),
        ({"skipped": [Note("a", "b")]}, True),
    ],
)
def test_a_report_is_ok_if_all_was_right_and_something_was_timed(changes, ok):
    report = made_up()
    report.checks = report.checks[:1]
    for name, value in changes.items():
        setattr(report, name, value)
    assert report.ok is ok
    report.checks = made_up().checks
    assert not report.ok


def test_files_of_a_report(tmp_path):
    commands.write(made_up(), tmp_path / "deep")
    assert json.loads((tmp_path / "deep" / "kernels.json").read_text())["timings"][0]["case"] == "case a"
    assert (tmp_path / "deep" / "kernels.png").read_bytes().startswith(b"\x89PNG")
    commands.write(TimingReport(MACHINE), tmp_path / "empty")
    assert [path.name for path in (tmp_path / "empty").iterdir()] == ["kernels.json"]
    with pytest.raises(InputError, match=r"--output-dir .* cannot be written"):
        commands.write(made_up(), tmp_path / "empty" / "kernels.json")


# --- the command line ---


def fade(*arguments):
    return CliRunner().invoke(build_app(), [str(a) for a in arguments])


def test_help_lists_the_commands_beside_the_cores_own():
    listed = fade("bench", "--help")
    assert listed.exit_code == 0
    for command in ("decode", "kernels", "tune"):
        assert command in listed.stdout
        assert "Usage" in fade("bench", command, "--help").stdout


@pytest.mark.parametrize("command", ["kernels", "tune"])
@pytest.mark.parametrize(
    ("arguments", "interpreted", "reason"),
    [
        ((), False, "torch finds none here"),
        ((), True, "TRITON_INTERPRET=1 runs kernels on the CPU, not on cuda"),
        (("--device", "cpu"), False, "needs a CUDA device; this is cpu"),
        (("--device", "cpu"), True, "the time of that says nothing"),
        (("--device", "gpu0"), False, "Invalid device string"),
    ],
)
def test_without_a_gpu_the_commands_say_why_they_refuse(command, arguments, interpreted, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(device, "find_spec", lambda name: object())
    monkeypatch.setattr(device, "interpreted", lambda: interpreted)
    refused = fade("bench", command, *arguments)
    assert refused.exit_code == 2
    assert reason in " ".join(refused.stderr.split())
    assert refused.stdout == ""


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert "torch sees 2 CUDA devices here" in fade("bench", "kernels", "--device", "cuda:2").stderr


@pytest.fixture
def as_on_a_gpu(monkeypatch, where):
    """The commands on whatever runs kernels here, over tiny cases, with a made-up clock."""
    clock, number = Clock(baseline=25.0, w2s3r3=2.0), seed()
    few = (DecodeConfig(), DecodeConfig(resident=2), DecodeConfig(2, 3, 3))
    monkeypatch.setattr(commands, "usable", lambda device: where)
    monkeypatch.setattr(commands, "machine", lambda made: MACHINE)
    monkeypatch.setattr(commands, "pool", lambda workers: ThreadPoolExecutor(1))
    monkeypatch.setattr(
        commands, "begin", lambda where, _, s, watch: session_of(where, clock, Budget(s), number=number)
    )
    monkeypatch.setattr(tuning, "candidates", lambda case, overlap: few)
    monkeypatch.setattr(device, "gpu_name", lambda device: GPU)
    monkeypatch.setattr(cases_module, "TIMED", (TINY, TOKEN))
    monkeypatch.setattr(cases_module, "PARITY", (TINY, replace(TOKEN, queries=2)))


@pytest.mark.slow
def test_kernels_prints_a_table_and_json_and_writes_files(as_on_a_gpu, tmp_path):
    shown = fade("bench", "kernels", "--only", "token", "--output-dir", tmp_path)
    assert shown.exit_code == 0, shown.output
    assert str(MACHINE) in shown.stdout
    (row,) = [line for line in shown.stdout.splitlines() if TOKEN.name in line]
    assert [cell.strip() for cell in row.strip("│ ").split("│")][1:4] == ["10.0", "25.0", "2.50"]
    assert [cell.strip() for cell in row.strip("│ ").split("│")][6:8] == ["10.0", "1.000"]
    assert "parity: 4 checks green" in shown.stdout
    assert TINY.name not in shown.stdout
    assert (tmp_path / "kernels.png").is_file()
    found = fade("bench", "kernels", "--json")
    data = json.loads(found.stdout)
    assert [timing["case"] for timing in data["timings"]] == [TINY.name, TOKEN.name]
    assert "parity: 8 checks green" in found.stderr


@pytest.mark.slow
def test_kernels_exits_with_1_and_names_what_was_not_timed(as_on_a_gpu, monkeypatch, tmp_path):
    spoilt(monkeypatch, lambda fmt, config: fmt.axis == "token")
    shown = fade("bench", "kernels", "--output-dir", tmp_path)
    assert shown.exit_code == 1
    assert f"parity is red: {TOKEN.name} q2 w1s3r8: error" in shown.stderr
    assert f"skipped: {TOKEN.name}: parity is red" in shown.stderr
    late = fade("bench", "kernels", "--budget", 0)
    assert late.exit_code == 1
    assert late.stderr.count("the budget was spent") == 4
    assert "--only 'd512'" in fade("bench", "kernels", "--only", "d512").stderr


def test_an_interrupted_run_keeps_what_it_has_found(as_on_a_gpu, monkeypatch, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(session, "time_kernels", interrupt)
    assert fade("bench", "kernels", "--output-dir", tmp_path).exit_code != 0
    assert len(json.loads((tmp_path / "kernels.json").read_text())["checks"]) == 4


@pytest.mark.slow
def test_tune_writes_a_file_that_fade_reads(as_on_a_gpu, monkeypatch, tmp_path):
    shown = fade("bench", "tune", "--only", "channel")
    assert shown.exit_code == 0, shown.output
    assert read_file(user_file(GPU)).decode == ((TINY.launch, DecodeConfig(2, 3, 3)),)
    (row,) = [line for line in shown.stdout.splitlines() if TINY.name in line]
    assert "w2s3r3" in row
    assert "FADE reads it from now on" in shown.stderr
    found = fade("bench", "tune", "--output", tmp_path / "mine.json", "--json")
    assert [one["case"] for one in json.loads(found.stdout)["searches"]] == [TINY.name, TOKEN.name]
    assert len(read_file(tmp_path / "mine.json").decode) == 2
    assert VARIABLE in found.stderr


def test_tune_refuses_a_bad_file_before_it_begins(as_on_a_gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(commands, "begin", lambda *given: pytest.fail("it began"))
    path = tmp_path / "bad.json"
    path.write_text("{}")
    refused = fade("bench", "tune", "--output", path)
    assert refused.exit_code == 2
    assert "bad.json holds" in refused.stderr
