"""The search for launch configurations: every candidate timed, the fastest one that is right kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fade_kernels_triton.bench.agreement import agreement
from fade_kernels_triton.bench.baselines import first_line
from fade_kernels_triton.bench.cases import Case
from fade_kernels_triton.bench.problems import build
from fade_kernels_triton.bench.report import Check, Note, Search, TuningReport
from fade_kernels_triton.bench.session import OUT_OF_TIME, REPLAYS, Session, calls, held_back, layers
from fade_kernels_triton.config import lookup
from fade_kernels_triton.launch import DecodeConfig, LaunchCase

SEARCH_REPLAYS = 5
FEW = 64
"""Rows and heads below which few programs a multiprocessor may be best: a row and head gets many splits, which are merged."""

Keep = Callable[[LaunchCase, DecodeConfig], None]
"""Takes what was found for a case."""


def candidates(case: Case, overlap: bool) -> Iterator[DecodeConfig]:
    """Launch configurations worth trying; with ``overlap``, such as let launches start early."""
    few = (1, 2, 3) if case.rows * case.kv_heads < FEW else ()
    for warps, stages in ((1, 3), (1, 2), (1, 4), (2, 3), (2, 2)):
        for resident in (*few, 4, 6, 8, 10, 12) if warps == 1 else (*few[1:2], 3, 4, 6):
            yield DecodeConfig(warps, stages, resident, overlap=overlap)
    for warps, stages, resident in ((1, 3, 5), (2, 3, 5), (2, 4, 4), (2, 4, 3)):
        yield DecodeConfig(warps, stages, resident, overlap=overlap)
    for stages in (2, 3):  # as many registers as ten and twelve warps a multiprocessor may take
        yield DecodeConfig(1, stages, 10, overlap=overlap, registers=200)
        yield DecodeConfig(1, stages, 12, overlap=overlap, registers=168)
    yield DecodeConfig(overlap=overlap, subnormal=False)
    if overlap:
        for warps, stages, resident in ((1, 3, 8), (1, 3, 4), (1, 2, 8), (2, 3, 4)):
            yield DecodeConfig(warps, stages, resident)


def tried_for(case: Case, device: torch.device, overlap: bool) -> list[DecodeConfig]:
    """The configuration in use, then the candidates: a search that is cut short is never worse than none."""
    return list(dict.fromkeys([lookup(case.launch, device), *candidates(case, overlap)]))


def tune(
    cases: Sequence[Case], red: Mapping[str, str], overlap: bool, session: Session, report: TuningReport, keep: Keep
) -> None:
    """Search for every case whose format is not in ``red``; ``keep`` is given what is found as soon as it is."""
    for done, case in enumerate(cases):
        session.watch(case.name, done, len(cases))
        if reason := held_back(case, red, session):
            report.skipped.append(Note(case.name, reason))
            continue
        configs = tried_for(case, session.device, overlap)
        try:
            found, check = search(case, configs, session)
        except Exception as error:  # noqa: BLE001 (named in the report; the other cases go on)
            report.failures.append(Note(case.name, f"{type(error).__name__}: {first_line(error)}"))
            continue
        finally:
            torch.cuda.empty_cache()
        report.checks.append(check)
        report.searches.append(found)
        if missed := sum(config not in found.tried and config not in found.troubles for config in configs):
            report.skipped.append(Note(f"{case.name}: {missed} of {len(configs)} configurations", OUT_OF_TIME))
        keep(case.launch, found.best[0])


def search(case: Case, configs: Sequence[DecodeConfig], session: Session) -> tuple[Search, Check]:
    """Time ``configs``, the first of which is in use; the fastest whose result is right, and its parity.

    The one in use is kept where none is faster than it when both are timed once more.

    Raises:
        RuntimeError: if no configuration runs, or none that runs is right.
    """
    problem = build(case, session.device, session.seed)
    problems = layers(problem)
    tried: dict[DecodeConfig, float] = {}
    troubles: dict[DecodeConfig, str] = {}
    for config in configs:
        if tried and session.budget.spent:
            break
        try:
            tried[config] = session.timer(calls(problems, config), SEARCH_REPLAYS)
        except Exception as error:  # noqa: BLE001 (a configuration that cannot run is one candidate less)
            troubles[config] = f"{type(error).__name__}: {first_line(error)}"
    if not tried:
        raise RuntimeError(f"no configuration runs; the one in use says {troubles[configs[0]]}")
    for chosen in sorted(tried, key=lambda config: tried[config]):
        check = Check(case.name, chosen, agreement(problem, chosen))
        if check.green:
            break
        troubles[chosen] = "what it computes is wrong"
    else:
        raise RuntimeError("no configuration that runs computes the case right")
    in_use = configs[0]
    again = [config for config in dict.fromkeys((in_use, chosen)) if config in tried]
    times = {config: session.timer(calls(problems, config), REPLAYS) for config in again}
    if times.get(in_use, math.inf) < times[chosen]:
        kept = Check(case.name, in_use, agreement(problem, in_use))
        chosen, check = (in_use, kept) if kept.green else (chosen, check)
    best = (chosen, times[chosen])
    return Search(case.name, case.launch, (in_use, times.get(in_use)), best, tried, troubles), check
