"""Compiling ahead in several processes; Triton's cache on disk carries what they compile over to this one."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Executor, as_completed
from contextlib import nullcontext
from dataclasses import replace

import torch

from fade_kernels_triton.bench.baselines import first_line
from fade_kernels_triton.bench.cases import Case
from fade_kernels_triton.bench.problems import build
from fade_kernels_triton.bench.report import Note, short
from fade_kernels_triton.bench.session import Session
from fade_kernels_triton.launch import DecodeConfig

Job = tuple[Case, DecodeConfig]


def workers() -> int:
    """Processes that compile: one a core, up to 14."""
    return min(14, os.cpu_count() or 1)


def jobs(wanted: Iterable[Job]) -> list[Job]:
    """The distinct compilations behind ``wanted``, each on a problem of a few tiles.

    Calibrated cases are run as they are: how many steps a program takes decides what is compiled.
    """
    return list(
        dict.fromkeys(
            (case, config) if case.calibrated else (case.small, replace(config, resident=2)) for case, config in wanted
        )
    )


def compile_ahead(wanted: Iterable[Job], session: Session, executor: Executor) -> list[Note]:
    """Compile in the workers of ``executor`` until all is done or the budget is spent; what failed, and why."""
    todo = jobs(wanted)
    futures = {executor.submit(run, *job, str(session.device), session.seed): job for job in todo}
    failed = []
    for done, future in enumerate(as_completed(futures)):
        session.watch("compiling", done, len(todo))
        case, config = futures[future]
        if error := future.exception():
            failed.append(Note(f"{case.name} {short(config)}", f"{type(error).__name__}: {first_line(error)}"))
        if session.budget.spent:
            executor.shutdown(wait=False, cancel_futures=True)
            break
    return failed


def run(case: Case, config: DecodeConfig, device: str, seed: int) -> None:
    """Compile one job by running it."""
    where = torch.device(device)
    with torch.cuda.device(where) if where.type == "cuda" else nullcontext():
        build(case, where, seed).run(config)
        if where.type == "cuda":
            torch.cuda.synchronize()
