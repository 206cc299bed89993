"""A run of either command: parity first, then what has a green format, until the budget is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby

import torch

from fade_kernels_triton.bench.agreement import agreement
from fade_kernels_triton.bench.baselines import CONTENDERS, AttendMaker, Baseline, first_line, measure
from fade_kernels_triton.bench.calibrated import unavailable
from fade_kernels_triton.bench.cases import Case
from fade_kernels_triton.bench.problems import Problem, build
from fade_kernels_triton.bench.report import Check, Note, Report, Timing, TimingReport
from fade_kernels_triton.bench.timing import Budget, Call, Timer, graph_time, layers_for
from fade_kernels_triton.config import lookup
from fade_kernels_triton.device import overlaps
from fade_kernels_triton.launch import DecodeConfig

REPLAYS = 15


def ways(device: torch.device) -> tuple[DecodeConfig, ...]:
    """Parity is checked with many short splits and with few long ones, whose launches overlap where the device can."""
    return DecodeConfig(), DecodeConfig(resident=2, overlap=overlaps(device))


OUT_OF_TIME = "the budget was spent"

Watch = Callable[[str, int, int], None]
"""Told what begins, how much is done and how much there is in all."""


@dataclass(frozen=True)
class Session:
    """What a run measures with.

    Attributes:
        device: where.
        seed: of the inputs.
        watch: told what begins.
        budget: until when something new may begin.
        timer: microseconds a call.
        contenders: what the kernel is compared with.
    """

    device: torch.device
    seed: int
    watch: Watch
    budget: Budget = field(default_factory=Budget)
    timer: Timer = graph_time
    contenders: Mapping[str, AttendMaker] = field(default_factory=lambda: CONTENDERS)


def check_formats(cases: Sequence[Case], session: Session, report: Report) -> dict[str, str]:
    """Check ``cases`` in all ``ways``; the formats that are red, and in which case."""
    red: dict[str, str] = {}
    for done, case in enumerate(cases):
        session.watch(f"parity: {case.name}", done, len(cases))
        if session.budget.spent:
            report.skipped.append(Note(f"parity: {case.name}", OUT_OF_TIME))
            continue
        if reason := unavailable(case):
            report.skipped.append(Note(f"parity: {case.name}", reason))
            continue
        for config in (None,) if case.calibrated else ways(session.device):
            try:
                found = Check(case.name, config, agreement(build(case, session.device, session.seed), config))
            except Exception as error:  # noqa: BLE001 (one case that raises is red and must not hide the others)
                found = Check(case.name, config, None, f"{type(error).__name__}: {first_line(error)}")
            report.checks.append(found)
            if not found.green:
                red.setdefault(case.format, case.name)
        torch.cuda.empty_cache()
    return red


def time_kernels(cases: Sequence[Case], red: Mapping[str, str], session: Session, report: TimingReport) -> None:
    """Time ``cases`` whose format is not in ``red``, each beside the baselines of its shape."""
    done = 0
    for shape, group in groupby(cases, lambda case: case.shape):
        baseline: Baseline | None = None
        for case in group:
            session.watch(case.name, done, len(cases))
            done += 1
            if reason := held_back(case, red, session):
                report.skipped.append(Note(case.name, reason))
                continue
            if baseline is None:
                session.watch(f"bf16 attention: {shape}", done - 1, len(cases))
                baseline = measure(case, session.device, session.timer, session.contenders)
                report.baselines.append(baseline)
                torch.cuda.empty_cache()
            _time_case(case, baseline, session, report)
            torch.cuda.empty_cache()


def held_back(case: Case, red: Mapping[str, str], session: Session) -> str:
    """Why ``case`` is not begun; empty if it is."""
    if case.format in red:
        return f"parity is red: {red[case.format]}"
    if reason := unavailable(case):
        return reason
    return OUT_OF_TIME if session.budget.spent else ""


def layers(problem: Problem) -> list[Problem]:
    """``problem`` and as many like it, in memory of their own, as move the cache's contents out."""
    return [problem, *(problem.again() for _ in range(layers_for(problem.nbytes) - 1))]


def calls(problems: Sequence[Problem], config: DecodeConfig | None) -> list[Call]:
    """A launch a problem."""
    return [partial(problem.run, config) for problem in problems]


def _time_case(case: Case, baseline: Baseline, session: Session, report: TimingReport) -> None:
    """Check and time one case as a cache would launch it, and the same tiles shuffled in a pool."""
    config = None if case.calibrated else lookup(case.launch, session.device)
    found = _checked_time(case, config, session, report)
    if found is None:
        return
    shuffled = None if case.calibrated else _checked_time(replace(case, table=True), config, session, report)
    table_us = None if shuffled is None else shuffled[0]
    report.timings.append(Timing(case.name, *found, config, baseline, table_us))


def _checked_time(
    case: Case, config: DecodeConfig | None, session: Session, report: TimingReport
) -> tuple[float, int] | None:
    """Microseconds a layer and bytes of the operands; ``None``, and why in ``report``, if the case is wrong or raises."""
    try:
        problem = build(case, session.device, session.seed)
        check = Check(case.name, config, agreement(problem, config))
        report.checks.append(check)
        if not check.green:
            report.skipped.append(Note(case.name, "parity is red: its own"))
            return None
        return session.timer(calls(layers(problem), config), REPLAYS), problem.nbytes
    except Exception as error:  # noqa: BLE001 (named in the report; the other cases go on)
        report.failures.append(Note(case.name, f"{type(error).__name__}: {first_line(error)}"))
        return None
