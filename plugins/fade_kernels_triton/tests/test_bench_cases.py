"""What ``fade bench kernels`` and ``tune`` measure: cases, their tensors, their parity, their baselines."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
import torch
from oracle import seed

from fade_core.errors import ConfigError
from fade_kernels_triton import decode
from fade_kernels_triton.bench import baselines, compiling, session
from fade_kernels_triton.bench.agreement import Agreement, agreement
from fade_kernels_triton.bench.cases import PARITY, SHAPES, TIMED, Case, checked, selected, variants
from fade_kernels_triton.bench.problems import build
from fade_kernels_triton.bench.timing import MAX_LAYERS, Budget, copy_bandwidth, layers_for, terabytes
from fade_kernels_triton.bench.tuning import candidates
from fade_kernels_triton.configfile import parse
from fade_kernels_triton.launch import DecodeConfig
from fade_kernels_triton.operands import unsupported_pair

TINY = Case(2, 4, 2, 64, 128)
FEW = DecodeConfig(warps=2, resident=2)


def once(calls, replays):
    """A timer that makes one call and says how many there were."""
    calls[0]()
    return float(len(calls))


# --- cases ---


def test_names_say_what_a_case_is():
    assert Case(8, 32, 8, 128, 32768).name == "8x32768 32/8 d128 int4-channel-64"
    assert Case(1, 4, 1, 64, 256, 3, value_bits=2, group=32).name == "1x256 4/1 d64 int3/2g32-channel-64"
    odd = Case(3, 4, 1, 64, 256, 2, "token", 128, 4, "float16", 70, table=True, ragged=True, flat=True)
    assert odd.name == "3x256 4/1 d64 int2-token-128 q4 float16 window70 table ragged flat"


@pytest.mark.parametrize("cases", [PARITY, TIMED])
def test_names_are_unique(cases):
    assert len({case.name for case in cases}) == len(cases)


def test_every_format_that_is_timed_is_checked_first():
    assert {case.format for case in TIMED} <= {case.format for case in PARITY}
    assert set(checked("")) == set(PARITY)
    assert {case.format for case in checked("int2-channel-128")} == {"int2-channel-128"}


def test_variants_differ_in_their_format_only():
    for shape in SHAPES:
        found = variants(shape)
        assert {case.shape for case in found} == {shape.shape}
        assert len({case.format for case in found}) == len(found) >= 2
    assert [len(variants(shape)) for shape in SHAPES] == [10, 9, 9, 3, 3, 3, 3]


def test_cases_are_selected_by_part_of_their_name():
    assert selected("") == TIMED
    assert {case.dim for case in selected("d256")} == {256}
    assert [case.name for case in selected("1x4096 32/8 d128 int4-token")] == ["1x4096 32/8 d128 int4-token-64"]
    with pytest.raises(ConfigError, match=r"--only 'd512'.*\n  8x32768 32/8 d128 int4-channel-64\n"):
        selected("d512")


def test_the_shipped_configurations_are_those_of_the_timed_cases():
    from fade_kernels_triton.config import shipped

    assert {case for case, _ in shipped().decode} == {case.launch for case in TIMED}


@pytest.mark.parametrize("case", [TINY, replace(TINY, bits=2, tile=128, axis="token", queries=2, window=9)])
def test_a_case_knows_what_its_launch_is_looked_up_by(case, monkeypatch, device):
    asked = []
    monkeypatch.setattr(decode, "lookup", lambda wanted, where: (asked.append(wanted), DecodeConfig())[1])
    problem = build(case, torch.device(device), seed())
    decode.decode_attention(problem.query, [problem.tier], problem.window)
    assert asked == [case.launch]


# --- problems and parity ---


def test_every_case_is_one_that_the_kernel_takes():
    for case in {case.small for case in (*PARITY, *TIMED)}:  # many cases differ in size alone
        built = build(case, torch.device("cpu"), 0)
        assert built.query.dtype == case.torch_dtype
        if case.calibrated:
            continue
        tier = built.tier
        assert not unsupported_pair(tier.key_format, tier.value_format, case.dim)
        assert (tier.table is not None, built.window is not None) == (case.table, bool(case.window))


def test_a_problem_is_the_same_again_and_in_memory_of_its_own(device):
    case = replace(TINY, window=20, table=True, ragged=True)
    number = seed()
    first, second = build(case, torch.device(device), number), build(case, torch.device(device), number)
    other = first.again()
    for twin in (second, other):
        assert torch.equal(first.query, twin.query)
        assert torch.equal(first.tier.keys["meta"], twin.tier.keys["meta"])
    fields = [(first.tier.values["codes4"], other.tier.values["codes4"]), (first.window.keys, other.window.keys)]
    assert all(a.data_ptr() != b.data_ptr() for a, b in fields)
    assert other.nbytes == first.nbytes
    assert not torch.equal(build(case, torch.device(device), number + 1).query, first.query)


def test_the_bytes_are_those_of_codes_metadata_and_window(device):
    problem = build(replace(TINY, window=10), torch.device(device), seed())
    codes = 2 * 2 * 2 * 128 * 64 // 2
    metadata = 4 * 2 * 2 * (2 * 64 + 128)  # a tile's channels for keys, tokens for values
    assert problem.nbytes == codes + metadata + 2 * 2 * 2 * 10 * 64 * 2


def test_a_table_changes_where_tokens_lie_and_not_what_they_are(device):
    number = seed()
    plain, pooled = (build(replace(TINY, table=table), torch.device(device), number) for table in (False, True))
    for row in range(2):
        for head in range(2):
            for found, wanted in zip(pooled.tokens(row, head), plain.tokens(row, head), strict=True):
                assert torch.equal(found, wanted)


@pytest.mark.parametrize("config", [DecodeConfig(), FEW])
@pytest.mark.parametrize(
    "case",
    [
        TINY,
        replace(TINY, bits=2, tile=128, axis="token", dtype="float16"),
        replace(TINY, context=256, window=21, table=True, ragged=True, queries=3),
        replace(TINY, flat=True, heads=7, kv_heads=1, queries=2),
    ],
    ids=lambda case: case.name,
)
def test_the_kernel_agrees(case, config, device):
    found = agreement(build(case, torch.device(device), seed()), config)
    assert found.green
    assert 0 < found.error < found.reference * 2 < 0.1


@pytest.mark.parametrize("spoil", [lambda x: x * 1.05, lambda x: x.roll(1, 1), lambda x: x * torch.nan])
def test_a_kernel_that_computes_something_else_is_red(spoil, monkeypatch, device):
    from fade_kernels_triton.bench import problems

    def spoilt(*given, **options):
        output, lse = decode.decode_attention(*given, **options)
        return spoil(output), lse

    monkeypatch.setattr(problems, "decode_attention", spoilt)
    assert not agreement(build(TINY, torch.device(device), seed()), DecodeConfig()).green


def test_one_wrong_head_shows_in_the_worst_ratio(monkeypatch, device):
    from fade_kernels_triton.bench import problems

    def spoilt(*given, **options):
        output, lse = decode.decode_attention(*given, **options)
        output[1, 2] *= 1.5
        return output, lse

    problem = build(TINY, torch.device(device), seed())
    before = agreement(problem, DecodeConfig()).worst
    monkeypatch.setattr(problems, "decode_attention", spoilt)
    assert agreement(problem, DecodeConfig()).worst > 10 * before


def test_what_is_not_finite_is_never_green():
    assert Agreement(1e-3, 1e-3, 1.0).green
    assert not Agreement(2.1e-3, 1e-3, 1.0).green
    assert not Agreement(float("inf"), float("inf"), 1.0).green


# --- timing, baselines, compiling ---


def test_layers_move_several_caches_of_bytes():
    largest_cache = 128 * 2**20
    for case in TIMED:
        elements = 2 * case.rows * case.kv_heads * case.context * case.dim
        for nbytes in (2 * elements, elements * case.bits // 8):
            assert layers_for(nbytes) * nbytes >= 2 * largest_cache
    assert layers_for(10) == MAX_LAYERS
    assert layers_for(10**12) == 2


def test_units():
    assert terabytes(2 * 10**12, 1e6) == 2.0
    assert copy_bandwidth(torch.device("cpu"), once, 10**6) == 2.0  # both ways, in the microsecond that the timer says


def test_a_budget_is_spent_when_its_time_has_passed():
    now = [100.0]
    budget = Budget(5, lambda: now[0])
    assert not budget.spent
    now[0] = 105.1
    assert budget.spent
    assert not Budget(None, lambda: now[0]).spent


def test_baselines_that_do_not_run_are_named_and_the_fastest_is_the_best():
    times = iter([3.0, 2.0])

    def timer(calls, replays):
        assert len({call().data_ptr() for call in calls}) == len(calls)  # each layer has buffers of its own
        return next(times)

    def broken():
        raise RuntimeError("\nno such kernel\nand more")

    contenders = {"a": lambda: lambda q, k, v: k, "b": broken, "c": lambda: lambda q, k, v: v}
    found = baselines.measure(TINY, torch.device("cpu"), timer, contenders)
    assert (dict(found.us), found.best) == ({"a": 3.0, "c": 2.0}, "c")
    assert found.troubles == {"b": "RuntimeError: no such kernel"}
    assert found.nbytes == 4 * 2 * 2 * 128 * 64
    assert found.to_dict()["did_not_run"] == found.troubles
    assert baselines.measure(TINY, torch.device("cpu"), timer, {"b": broken}).best is None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["flash", "flex"])
def test_what_the_baselines_compute_is_attention(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)  # its own promise to change nothing
    query, keys, values = torch.randn(2, 4, 1, 64), *torch.randn(2, 2, 2, 128, 64)
    seed()
    found = baselines.CONTENDERS[name]()(query, keys, values)
    scores = (query.view(2, 2, 2, 64) @ keys.mT) / 8
    torch.testing.assert_close(found.view(2, 2, 2, 64), scores.softmax(-1) @ values, atol=1e-5, rtol=1e-4)


def test_backends_that_a_device_lacks_say_so():
    assert set(baselines.CONTENDERS) == {"flash", "cudnn", "flex"}
    found = baselines.measure(
        TINY, torch.device("cpu"), once, {name: baselines.CONTENDERS[name] for name in ("flash", "cudnn")}
    )
    assert set(found.us) == {"flash"}
    assert set(found.troubles) == {"cudnn"}


def test_compilations_are_shared_and_can_be_sent_to_a_worker():
    same = [(TINY, DecodeConfig(resident=n)) for n in (4, 8)] + [(replace(TINY, rows=7, context=4096), DecodeConfig())]
    assert compiling.jobs(same) == [(TINY.small, DecodeConfig(resident=2))]
    assert len(compiling.jobs([*same, (TINY, FEW), (replace(TINY, tile=128), DecodeConfig())])) == 3
    assert pickle.loads(pickle.dumps((compiling.run, *same[0])))[1:] == same[0]  # noqa: S301


def test_compiling_ahead_names_what_fails_and_stops_when_the_budget_is_spent(device):
    clock = iter(range(100))
    seen = []
    made = session.Session(torch.device(device), seed(), lambda *step: seen.append(step), Budget())
    wanted = [(TINY, DecodeConfig()), (replace(TINY, dim=72), DecodeConfig())]
    with ThreadPoolExecutor(1) as executor:
        (failed,) = compiling.compile_ahead(wanted, made, executor)
    assert failed.what.startswith("1x256 4/2 d72 int4-channel-64 w1s3r2")
    assert "72" in failed.why
    assert [done for _, done, total in seen if total == 2] == [0, 1]
    spent = replace(made, budget=Budget(0.5, lambda: next(clock)))
    with ThreadPoolExecutor(1) as executor:
        assert compiling.compile_ahead(wanted, spent, executor) == []


def test_configuration_files_take_every_candidate():
    for case in TIMED:
        for config in candidates(case, overlap=True):
            row = {"case": asdict(case.launch), "config": asdict(config)}
            assert parse(json.dumps({"gpu": "x", "decode": [row]}), "f").decode == ((case.launch, config),)
