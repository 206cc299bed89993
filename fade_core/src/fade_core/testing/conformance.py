"""The tests that the pytest plugin collects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fade_core.testing.checks import CheckReport


def test_conformance(fade_report: CheckReport) -> None:
    """One check of one component."""
    (result,) = fade_report.results
    if result.outcome == "not applicable":
        pytest.skip(result.message)
    if result.outcome == "expected failure":
        pytest.xfail(f"{result.expected_failure}: {result.message}")
    if not result.passed:
        pytest.fail(f"{result.message} (--fade-seed {fade_report.seed})", pytrace=False)
