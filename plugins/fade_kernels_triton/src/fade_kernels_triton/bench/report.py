"""What the commands found, for JSON and for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fade_kernels_triton.bench.agreement import Agreement
from fade_kernels_triton.bench.baselines import Baseline
from fade_kernels_triton.bench.timing import terabytes
from fade_kernels_triton.launch import DecodeConfig, LaunchCase


@dataclass(frozen=True)
class Machine:
    """What it ran on.

    Attributes:
        gpu: name of the GPU.
        torch, triton: versions.
        copy_tb_s: measured TB/s of a large copy, bytes read plus bytes written.
        seed: of the inputs.
    """

    gpu: str
    torch: str
    triton: str
    copy_tb_s: float
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.gpu}, torch {self.torch}, Triton {self.triton}, copying {self.copy_tb_s:.2f} TB/s, seed {self.seed}"
        )


@dataclass(frozen=True)
class Check:
    """One parity check: the case, how the kernel was launched, and the errors or what went wrong."""

    case: str
    config: DecodeConfig | None
    agreement: Agreement | None
    trouble: str = ""

    @property
    def green(self) -> bool:
        """Whether the kernel computed the case, within twice bf16's own error."""
        return self.agreement is not None and self.agreement.green

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        errors = asdict(self.agreement) if self.agreement is not None else {}
        finite = {name: value if math.isfinite(value) else None for name, value in errors.items()}
        return {
            "case": self.case,
            "config": _as_dict(self.config),
            "green": self.green,
            **finite,
            "trouble": self.trouble,
        }


@dataclass(frozen=True)
class Timing:
    """One timed case.

    Attributes:
        case: its name.
        us: microseconds a layer.
        nbytes: of the operands.
        config: how the kernel was launched; ``None`` where nothing can be chosen.
        baseline: bf16 attention of the same shape, in the same run.
        table_us: microseconds a layer where the same tiles lie shuffled in a pool; ``None`` where that was not timed.
    """

    case: str
    us: float
    nbytes: int
    config: DecodeConfig | None
    baseline: Baseline
    table_us: float | None = None

    @property
    def ratio(self) -> float | None:
        """How many times faster than the fastest baseline; ``None`` if none ran."""
        best = self.baseline.best
        return None if best is None else self.baseline.us[best] / self.us

    @property
    def tb_s(self) -> float:
        """TB/s of the operands."""
        return terabytes(self.nbytes, self.us)

    @property
    def table_ratio(self) -> float | None:
        """Time through a table, of that without."""
        return None if self.table_us is None else self.table_us / self.us

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "case": self.case,
            "us": round(self.us, 2),
            "table_us": None if self.table_us is None else round(self.table_us, 2),
            "table_to_flat": None if self.table_ratio is None else round(self.table_ratio, 3),
            "times_faster": None if self.ratio is None else round(self.ratio, 3),
            "than": self.baseline.best,
            "tb_s": round(self.tb_s, 3),
            "config": _as_dict(self.config),
        }


@dataclass(frozen=True)
class Search:
    """The launch configuration found for one case.

    Attributes:
        case: its name.
        launch: what the row of the file says.
        before: configuration that was in use, and its microseconds a layer; ``None`` if it did not run.
        best: configuration found, and its microseconds in the same buffers; the former where none was faster.
        tried: microseconds by configuration, of the search.
        troubles: why configurations did not run or were wrong.
    """

    case: str
    launch: LaunchCase
    before: tuple[DecodeConfig, float | None]
    best: tuple[DecodeConfig, float]
    tried: Mapping[DecodeConfig, float]
    troubles: Mapping[DecodeConfig, str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        config, us = self.before
        return {
            "case": self.case,
            "launch": asdict(self.launch),
            "before": {"config": asdict(config), "us": None if us is None else round(us, 2)},
            "best": {"config": asdict(self.best[0]), "us": round(self.best[1], 2)},
            "tried": {short(config): round(us, 2) for config, us in self.tried.items()},
            "troubles": {short(config): trouble for config, trouble in self.troubles.items()},
        }


@dataclass(frozen=True)
class Note:
    """Something that was not done, and why."""

    what: str
    why: str


@dataclass
class Report:
    """What a run has found so far.

    Attributes:
        machine: what it ran on.
        checks: parity.
        skipped: what the budget or red parity kept from being done.
        failures: what was tried and raised.
        uncompiled: what did not compile ahead; it is met again, and counts, where it is needed.
    """

    machine: Machine
    checks: list[Check] = field(default_factory=list)
    skipped: list[Note] = field(default_factory=list)
    failures: list[Note] = field(default_factory=list)
    uncompiled: list[Note] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether all parity checks were green and nothing failed."""
        return all(check.green for check in self.checks) and not self.failures

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        notes = {name: [asdict(n) for n in getattr(self, name)] for name in ("skipped", "failures", "uncompiled")}
        return {"machine": asdict(self.machine), "checks": [check.to_dict() for check in self.checks], **notes}


@dataclass
class TimingReport(Report):
    """What ``fade bench kernels`` has found so far."""

    baselines: list[Baseline] = field(default_factory=list)
    timings: list[Timing] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether parity was green, nothing failed, and something was timed."""
        return super().ok and bool(self.timings)

    def to_dict(self) -> dict[str, Any]:
        return {
            **super().to_dict(),
            "baselines": [one.to_dict() for one in self.baselines],
            "timings": [one.to_dict() for one in self.timings],
        }


@dataclass
class TuningReport(Report):
    """What ``fade bench tune`` has found so far."""

    searches: list[Search] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether parity was green, nothing failed, and something was found."""
        return super().ok and bool(self.searches)

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "searches": [search.to_dict() for search in self.searches]}


def _as_dict(config: DecodeConfig | None) -> dict[str, Any] | None:
    return None if config is None else asdict(config)


def short(config: DecodeConfig | None) -> str:
    """Warps, stages, residents and flags (overlap, normal codes) in a word: ``w1s3r8o``."""
    if config is None:
        return "-"
    flags = "o" * config.overlap + "n" * (not config.subnormal)
    return f"w{config.warps}s{config.stages}r{config.resident}{flags}{f'x{config.registers}' * bool(config.registers)}"
