"""The flat spelling: ``FadeConfig(phase="2", int4_budget=400, middle_v_bits=2)`` and what it means nested.

| flat | nested |
|---|---|
| ``phase="1a"`` | nothing is evicted: no bounded rung, no ``policy.budget`` |
| ``phase="2"`` | the ladder is bounded by the two budgets and what overflows it is evicted; ``policy.kind`` is "h2o" |
| ``int4_budget=N`` | ``ladder = [{tier = "packed", capacity = N}]``; 0 for no such rung |
| ``int2_budget=N`` | one more rung ``{tier = "int2", capacity = N}`` |
| ``eviction_policy`` | ``policy.kind`` |
| ``reassign_every`` | ``policy.every`` |
| ``middle_k_bits``, ``middle_v_bits`` | ``keys.bits``, ``values.bits`` |
| ``quant_backend`` | ``keys.kind`` and ``values.kind``: "int4" is ``uniform``, "turbo" and "rotated" are ``rotated`` |
| ``prefill_track_limit`` | ``observation_window`` |
| ``int2_group_size`` | ``group`` of the keys of the int2 rung (tokens of a channel that share a scale) |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fade_core.builtin.quantizers.uniform import UniformConfig
from fade_core.errors import ConfigError
from fade_core.interfaces import ComponentConfig, PolicyConfig, QuantizerConfig, TierConfig
from fade_core.plugins.resolve import resolve
from fade_core.support.validation import CheckedModel, Count, WholeNumber

WHOLE_TILE = 64
"""The group size that needs no group of its own: it is a whole tile."""

_BACKENDS = {"int4": "uniform", "uniform": "uniform", "turbo": "rotated", "rotated": "rotated"}


class FlatSpelling(CheckedModel):
    """The flat names and their types; ``None`` where one was not written."""

    phase: Literal["1a", "2"] | None = None
    int4_budget: WholeNumber | None = None
    int2_budget: WholeNumber = 0
    eviction_policy: str | None = None
    reassign_every: Count | None = None
    middle_k_bits: Count | None = None
    middle_v_bits: Count | None = None
    quant_backend: Literal["int4", "uniform", "turbo", "rotated"] | None = None
    prefill_track_limit: Count | None = None
    int2_group_size: Count | None = None


NAMES: tuple[str, ...] = tuple(FlatSpelling.model_fields)


@dataclass(frozen=True)
class Defaults:
    """What the flat names change: the components that hold where the nested spelling says nothing.

    Attributes:
        fresh: whether these are the defaults of a new configuration; budgets then bring the policy "h2o" with them.
    """

    keys: QuantizerConfig
    values: QuantizerConfig
    policy: PolicyConfig
    ladder: tuple[TierConfig, ...] = ()
    fresh: bool = True


Wanted = dict[str, tuple[str, Any]]
"""Nested field to the flat name that sets it and the value."""


def nest(data: Mapping[str, Any], base: Defaults) -> dict[str, Any]:
    """``data`` with every flat name replaced by what it means.

    Raises:
        ConfigError: for values that cannot work, or where both spellings are used with different values.
    """
    written = {name: value for name, value in data.items() if name in NAMES}
    nested = {name: value for name, value in data.items() if name not in NAMES}
    if not written:
        return nested
    flat = FlatSpelling(**written)
    phase = _phase(flat)
    backend = _BACKENDS[flat.quant_backend] if flat.quant_backend else None
    for side, name, bits in (
        ("keys", "middle_k_bits", flat.middle_k_bits),
        ("values", "middle_v_bits", flat.middle_v_bits),
    ):
        _set(nested, side, getattr(base, side), {"kind": ("quant_backend", backend), "bits": (name, bits)})
    policy: Wanted = {
        "kind": ("eviction_policy", flat.eviction_policy),
        "every": ("reassign_every", flat.reassign_every),
    }
    if phase == "2" and flat.eviction_policy is None and "policy" not in nested and (base.fresh or flat.phase == "2"):
        policy["kind"] = ("phase", "h2o")
    _set(nested, "policy", base.policy, policy)
    _set_scalar(nested, "observation_window", "prefill_track_limit", flat.prefill_track_limit)
    if phase == "2":
        _set_ladder(nested, flat, base)
    elif phase == "1a":
        _set_unbounded(nested, base)
    _check_group_is_used(flat)
    return nested


def _phase(flat: FlatSpelling) -> str | None:
    budgets = f"int4_budget={flat.int4_budget}, int2_budget={flat.int2_budget}"
    bounded = flat.int4_budget is not None or flat.int2_budget > 0
    if flat.phase == "1a" and bounded:
        raise ConfigError(f"phase='1a' evicts nothing, but found {budgets}; drop the budgets or write phase='2'")
    if flat.phase == "2" and not bounded:
        raise ConfigError(f"phase='2' needs int4_budget or int2_budget above 0; found {budgets}")
    if not bounded:
        return flat.phase
    if flat.int4_budget is None:
        raise ConfigError(
            f"int2_budget={flat.int2_budget} takes what int4_budget leaves over, but int4_budget is missing; "
            f"write int4_budget=0 to have the int2 tier alone"
        )
    if not flat.int4_budget and not flat.int2_budget:
        raise ConfigError(f"a budget above 0 is needed; found {budgets}")
    return "2"


def _set(nested: dict[str, Any], path: str, base: ComponentConfig, wanted: Wanted) -> None:
    """Put ``wanted`` into the component ``nested[path]``, or into ``base`` where that is not written."""
    wanted = {field: (name, value) for field, (name, value) in wanted.items() if value is not None}
    if not wanted:
        return
    values = {field: value for field, (_, value) in wanted.items()}
    given = nested.get(path)
    if given is None:
        nested[path] = changed(base, values)
        return
    if isinstance(given, ComponentConfig):
        present = _written(given)
    elif isinstance(given, Mapping):
        present = dict(given)
    else:
        return  # not a component: validation says so
    for field, (name, value) in wanted.items():
        if field in present and present[field] != value:
            raise ConfigError(
                f"{name} asks for {path}.{field}={value!r}, but {path}.{field}={present[field]!r} is written too; "
                f"keep one of them"
            )
    present |= values
    nested[path] = type(given).model_validate(present) if isinstance(given, ComponentConfig) else present


def changed(component: ComponentConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """``component`` with ``values``, as a mapping; under another ``kind``, the fields that every kind has are kept."""
    written = _written(component)
    if values.get("kind", written["kind"]) != written["kind"]:
        shared = QuantizerConfig if isinstance(component, QuantizerConfig) else PolicyConfig
        written = {field: value for field, value in written.items() if field in shared.model_fields}
    return {**written, **values}


def _written(component: ComponentConfig) -> dict[str, Any]:
    return {field: getattr(component, field) for field in {"kind", *component.model_fields_set}}


def _set_scalar(nested: dict[str, Any], path: str, name: str, value: Any) -> None:
    if value is None:
        return
    if path in nested and nested[path] != value:
        raise ConfigError(f"{name}={value!r} and {path}={nested[path]!r} say different things; keep one of them")
    nested[path] = value


def _set_ladder(nested: dict[str, Any], flat: FlatSpelling, base: Defaults) -> None:
    rungs: list[dict[str, Any]] = []
    if flat.int4_budget:
        rungs.append({"tier": "packed", "capacity": flat.int4_budget})
    if flat.int2_budget:
        rung: dict[str, Any] = {"tier": "int2", "capacity": flat.int2_budget}
        if flat.int2_group_size is not None:
            rung["keys"] = _grouped(nested.get("keys", base.keys), flat.int2_group_size)
        rungs.append(rung)
    ladder = _tiers(rungs)
    if nested.get("ladder") and _tiers(nested["ladder"]) != ladder:
        raise ConfigError(
            f"int4_budget={flat.int4_budget} and int2_budget={flat.int2_budget} mean ladder={rungs}, "
            f"but ladder={nested['ladder']!r} is written too; keep one of them"
        )
    nested["ladder"] = ladder


def _set_unbounded(nested: dict[str, Any], base: Defaults) -> None:
    policy = nested.get("policy", base.policy)
    budget = policy.get("budget") if isinstance(policy, Mapping) else getattr(policy, "budget", None)
    if budget is not None:
        if "policy" in nested:
            raise ConfigError(f"phase='1a' evicts nothing, but policy.budget={budget!r} does; keep one of them")
        nested["policy"] = changed(base.policy, {"budget": None})
    ladder = nested.get("ladder", base.ladder)
    if ladder:
        last = _tiers(ladder)[-1]
        if last.capacity != "rest" or last.tier == "evicted":
            if "ladder" in nested:
                raise ConfigError(f"phase='1a' evicts nothing, but the ladder does ({last!r}); keep one of them")
            nested["ladder"] = ()


def _tiers(rungs: Any) -> tuple[TierConfig, ...]:
    if not isinstance(rungs, (list, tuple)):
        raise ConfigError(f"ladder: a list of tiers is needed; found {rungs!r}")
    return tuple(rung if isinstance(rung, TierConfig) else resolve("tiers", rung, "tier") for rung in rungs)


def _grouped(keys: Any, group: int) -> QuantizerConfig:
    config = keys if isinstance(keys, QuantizerConfig) else resolve("quantizers", keys)
    if not isinstance(config, UniformConfig) or config.axis != "channel":
        raise ConfigError(f"int2_group_size={group} groups the tokens of a channel, which {config!r} does not")
    return UniformConfig(bits=2, axis="channel", group=group)


def _check_group_is_used(flat: FlatSpelling) -> None:
    if flat.int2_group_size not in (None, WHOLE_TILE) and not flat.int2_budget:
        raise ConfigError(
            f"int2_group_size={flat.int2_group_size} has no effect without int2_budget; "
            f"groups of the middle tier are keys.group and values.group"
        )
