"""What a conformance check is, what comes out of it, and how a list of them is run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from fade_core.errors import FadeError, InputError

Case = TypeVar("Case")
Outcome = Literal["passed", "failed", "expected failure", "not applicable"]


class CheckFailedError(AssertionError):
    """A component does not do what its interface promises; the message says what was found."""


class NotApplicableError(Exception):
    """A check does not concern this component or machine; the message says why."""


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check.

    Attributes:
        name: of the check.
        passed: whether nothing is wrong: it passed, failed as expected, or does not apply here.
        message: what was found, or what the check makes sure of if it passed.
        expected_failure: the reason given for a failure that was announced, or ``None``.
        outcome: in one word.
        seed: that the inputs were drawn with.
    """

    name: str
    passed: bool
    message: str
    expected_failure: str | None
    outcome: Outcome
    seed: int


@dataclass(frozen=True)
class CheckReport:
    """Outcomes of all checks of one component.

    Attributes:
        component: "KIND:NAME".
        seed: that the inputs were drawn with.
        results: one a check.
    """

    component: str
    seed: int
    results: tuple[CheckResult, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed, failed as expected, or does not apply here."""
        return all(result.passed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "component": self.component,
            "seed": self.seed,
            "ok": self.ok,
            "results": [asdict(r) for r in self.results],
        }


@dataclass(frozen=True)
class Suite(Generic[Case]):
    """The checks of one kind of component.

    Attributes:
        checks: functions of a case; the first line of the docstring says what each makes sure of.
    """

    checks: tuple[Callable[[Case], None], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the checks."""
        return tuple(check.__name__ for check in self.checks)

    def run(
        self,
        make_case: Callable[[torch.Generator], Case],
        seed: int,
        expected_failures: Mapping[str, str] | None = None,
        progress: Callable[[int, int], None] | None = None,
        only: Sequence[str] = (),
    ) -> list[CheckResult]:
        """Run the checks, each on a fresh case and a generator of its own.

        Args:
            make_case: builds the case from a seeded generator.
            seed: of the inputs.
            expected_failures: names of checks that are known to fail, each with the reason.
            progress: called as checks are done.
            only: names of the checks to run; empty for all.

        Raises:
            InputError: if ``expected_failures`` or ``only`` names no check, or a reason is missing.
        """
        expected = dict(expected_failures or {})
        for name in (*expected, *only):
            if name not in self.names:
                raise InputError(f"there is no check {name!r} (known: {', '.join(self.names)})")
        for name, reason in expected.items():
            if not reason.strip():
                raise InputError(f"the expected failure of {name!r} needs a reason")
        chosen = [check for check in self.checks if not only or check.__name__ in only]
        results = []
        for number, check in enumerate(chosen, start=1):
            results.append(_run(check, make_case, seed, expected.get(check.__name__)))
            if progress is not None:
                progress(number, len(chosen))
        return results


def _run(
    check: Callable[[Case], None], make_case: Callable[[torch.Generator], Case], seed: int, reason: str | None
) -> CheckResult:
    generator = torch.Generator().manual_seed(seed)
    promise = (check.__doc__ or "").strip().splitlines()[0]
    name = check.__name__
    try:
        check(make_case(generator))
    except NotApplicableError as error:
        return CheckResult(name, True, str(error), None, "not applicable", seed)
    except Exception as error:  # noqa: BLE001 (whatever a component raises is a finding)
        text = str(error) if isinstance(error, CheckFailedError) else f"raised {type(error).__name__}: {error}"
        if reason is not None:
            return CheckResult(name, True, text, reason, "expected failure", seed)
        return CheckResult(name, False, text, None, "failed", seed)
    if reason is not None:
        text = f"passes, but was announced as an expected failure ({reason}); take it off the list"
        return CheckResult(name, False, text, reason, "failed", seed)
    return CheckResult(name, True, promise, None, "passed", seed)


def fresh_seed() -> int:
    """A seed from the clock."""
    return time.time_ns() % 2**31


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """A random order of ``count`` things in which none keeps its place, int64 ``[count]``."""
    ring = torch.randperm(count, generator=generator)
    found = torch.empty_like(ring)
    found[ring] = ring.roll(1)
    return found


def require(condition: bool, message: str) -> None:
    """Raise ``CheckFailedError`` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise CheckFailedError(message)


def require_raises(wanted: type[FadeError], what: str, run: Callable[[], object]) -> None:
    """``run`` must raise ``wanted`` with a message; ``what`` names the bad input."""
    try:
        run()
    except wanted as error:
        require(bool(str(error).strip()), f"{what}: {type(error).__name__} came without a message")
    except Exception as error:
        raise CheckFailedError(
            f"{what}: {wanted.__name__} is needed, {type(error).__name__} was raised: {error}"
        ) from error
    else:
        raise CheckFailedError(f"{what} was accepted; {wanted.__name__} is needed")


def require_close(found: Tensor, wanted: Tensor, tolerance: float, what: str) -> None:
    """Same shape and no element further apart than ``tolerance`` (NaN never is close)."""
    require(found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, {tuple(wanted.shape)} is needed")
    if not found.numel():
        return
    off = (found.double() - wanted.double()).abs()
    worst = float(off.nan_to_num(nan=torch.inf).max())
    require(worst <= tolerance, f"{what}: off by up to {worst:.3g}, {tolerance:.3g} is allowed")


def require_equal(found: Tensor, wanted: Tensor, what: str) -> None:
    """Same shape, dtype and bits (NaN equals NaN)."""
    require(found.shape == wanted.shape, f"{what}: shape {tuple(found.shape)}, {tuple(wanted.shape)} is needed")
    require(found.dtype == wanted.dtype, f"{what}: {found.dtype}, {wanted.dtype} is needed")
    same = bool(torch.equal(found, wanted)) or bool(((found == wanted) | (found.isnan() & wanted.isnan())).all())
    require(same, f"{what}: {int((found != wanted).sum())} of {found.numel()} elements differ")


def unchanged(what: str, *tensors: Tensor) -> Callable[[], None]:
    """A function that fails if one of ``tensors`` has changed since now."""
    before = [tensor.clone() for tensor in tensors]

    def check() -> None:
        for tensor, old in zip(tensors, before, strict=True):
            require_equal(tensor, old, f"{what} (an input must not be changed)")

    return check
