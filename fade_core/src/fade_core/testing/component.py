"""Checking what is installed by name: "policies:h2o", "rope:yarn", "kernels:decode_attention:torch"."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fade_core.errors import ConfigError, InputError
from fade_core.plugins import default_registry
from fade_core.plugins.resolve import resolve
from fade_core.testing.checks import CheckReport, CheckResult, Suite, fresh_seed
from fade_core.testing.kernel import KERNEL_CHECKS, check_kernel
from fade_core.testing.policy import POLICY_CHECKS, check_policy
from fade_core.testing.quantizer import QUANTIZER_CHECKS, check_quantizer
from fade_core.testing.rope import ROPE_CHECKS, check_rope
from fade_core.testing.telemetry import SINK_CHECKS, check_telemetry_sink

Checked = Literal["quantizers", "policies", "rope_schemes", "kernels", "telemetry_sinks"]

_KINDS: dict[str, Checked] = {
    "quantizers": "quantizers",
    "quantizer": "quantizers",
    "policies": "policies",
    "policy": "policies",
    "rope": "rope_schemes",
    "rope_schemes": "rope_schemes",
    "kernels": "kernels",
    "kernel": "kernels",
    "telemetry": "telemetry_sinks",
    "telemetry_sinks": "telemetry_sinks",
}
_SUITES: dict[Checked, Suite[Any]] = {
    "quantizers": QUANTIZER_CHECKS,
    "policies": POLICY_CHECKS,
    "rope_schemes": ROPE_CHECKS,
    "kernels": KERNEL_CHECKS,
    "telemetry_sinks": SINK_CHECKS,
}


def check_names(component: str) -> tuple[str, ...]:
    """Names of the checks that a component will go through. Errors as ``check_component``."""
    return _SUITES[_split(component)[0]].names


def check_component(
    component: str,
    *,
    fields: Mapping[str, Any] | None = None,
    seed: int | None = None,
    model: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    only: tuple[str, ...] = (),
) -> CheckReport:
    """Check an installed component.

    Args:
        component: "KIND:NAME"; kinds are quantizers, policies, rope, kernels ("kernels:OP:NAME") and telemetry.
        fields: of its configuration, besides the name.
        seed: of the inputs; ``None`` draws one.
        model: for a RoPE scheme, the model whose config it is built for.
        expected_failures: checks that are known to fail, with the reason.
        progress: called as checks are done.
        only: names of the checks to run; empty for all.

    Raises:
        InputError: for something that is not KIND:NAME, or a kind that has no checks.
        UnknownComponentError: for a name that nothing installed provides.
        ConfigError: if ``fields`` do not fit.
    """
    group, name = _split(component)
    drawn = fresh_seed() if seed is None else seed
    common: dict[str, Any] = {
        "seed": drawn,
        "expected_failures": expected_failures,
        "progress": progress,
        "only": only,
    }
    with tempfile.TemporaryDirectory() as folder:
        results = _check(group, name, {**(fields or {})}, model, Path(folder), common)
    return CheckReport(component, drawn, tuple(results))


def read_fields(texts: Sequence[str]) -> dict[str, Any]:
    """``["bits=2", "path=a.pt"]`` as fields; values are JSON, or strings where they are not.

    Raises:
        InputError: for something that is not FIELD=VALUE.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise InputError(f"{text!r} is not FIELD=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _check(
    group: Checked, name: str, fields: dict[str, Any], model: str | None, folder: Path, common: dict[str, Any]
) -> list[CheckResult]:
    if group == "kernels":
        if fields:
            raise InputError(f"a kernel has no fields to set; found {', '.join(fields)}")
        return check_kernel(name, **common)
    component = default_registry().get(group, name)
    if group == "telemetry_sinks" and "path" in component.model_fields:
        fields.setdefault("path", str(folder / "events"))
    try:
        config: Any = resolve(group, {"kind": name, **fields})
    except ConfigError as error:
        raise ConfigError(f"{group}:{name}: {error} (give fields with --set FIELD=VALUE, or fields={{...}})") from error
    if group == "quantizers":
        return check_quantizer(config, **common)
    if group == "policies":
        return check_policy(config, **common)
    if group == "rope_schemes":
        return check_rope(config, model_config=_model_config(model), **common)
    return check_telemetry_sink(config, **common)


def _model_config(model: str | None) -> Any:
    if model is None:
        return None
    from fade_core.models.loading import load_skeleton

    return load_skeleton(model).config


def _split(component: str) -> tuple[Checked, str]:
    """Group and name. Errors as ``check_component``."""
    kind, _, name = component.partition(":")
    if kind not in _KINDS or not name:
        raise InputError(
            f"{component!r} is not KIND:NAME, such as policies:h2o; "
            f"kinds are quantizers, policies, rope, kernels and telemetry"
        )
    group = _KINDS[kind]
    if group != "kernels":
        default_registry().get(group, name)  # raises for a name that is not known
    return group, name
