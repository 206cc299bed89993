"""The conformance kit: run it against your own quantizer, policy, RoPE scheme, kernel or telemetry sink.

    from fade_core.testing import check_policy
    assert all(result.passed for result in check_policy(MyConfig()))

or ``fade check policies:NAME``, or ``pytest -p fade_core.testing.pytest_plugin --fade-component policies:NAME``.
"""

from __future__ import annotations

from fade_core.testing.checks import CheckReport, CheckResult
from fade_core.testing.component import check_component, check_names
from fade_core.testing.kernel import check_kernel
from fade_core.testing.policy import check_policy
from fade_core.testing.quantizer import check_quantizer
from fade_core.testing.rope import check_rope
from fade_core.testing.telemetry import check_telemetry_sink

__all__ = [
    "CheckReport",
    "CheckResult",
    "check_component",
    "check_kernel",
    "check_names",
    "check_policy",
    "check_quantizer",
    "check_rope",
    "check_telemetry_sink",
]
