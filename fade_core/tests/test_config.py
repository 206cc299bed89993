"""FadeConfig: both spellings, three file formats, the schema, and everything that is refused."""

from __future__ import annotations

import copy
import json
import pickle
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st
from plugin_maker import provider

from fade_core import FadeConfig, PolicyConfig, TierConfig
from fade_core.builtin.policies.h2o import H2OConfig
from fade_core.builtin.policies.position import PositionConfig
from fade_core.builtin.quantizers.uniform import UniformConfig
from fade_core.config.files import read_table, write_table
from fade_core.config.flat_spelling import NAMES
from fade_core.errors import ConfigError, PluginError, UnknownComponentError
from fade_core.plugins import Registry, use_registry

FORMATS = ("toml", "yaml", "yml", "json")


@pytest.fixture(autouse=True)
def core_alone() -> Iterator[None]:
    """What is installed beside the core does not matter here."""
    with use_registry(Registry(entry_points=False)):
        yield


# --- arbitrary configurations ---

widths = st.sampled_from([2, 3, 4, 8, 16])
shares = st.one_of(st.integers(1, 10**6), st.floats(0, 1, exclude_min=True))
quantizers = st.fixed_dictionaries(
    {"kind": st.just("uniform")},
    optional={"bits": widths, "axis": st.sampled_from(["token", "channel"]), "group": st.sampled_from([0, 16, 32])},
)
policies = st.one_of(
    st.fixed_dictionaries({"kind": st.just("position")}, optional={"every": st.integers(1, 500)}),
    st.fixed_dictionaries(
        {"kind": st.just("h2o")},
        optional={"budget": st.one_of(st.integers(2000, 10**6), st.floats(0, 1, exclude_min=True), st.none())}
        | {"normalised": st.booleans()},
    ),
    st.fixed_dictionaries({"kind": st.just("ema")}, optional={"decay": st.floats(0.01, 0.999)}),
)
sides = {"keys": quantizers, "values": quantizers}
rungs = st.one_of(
    st.fixed_dictionaries({"tier": st.sampled_from(["int4", "int2", "packed"])}, optional=sides),
    st.just({"tier": "fp16"}),
)


@st.composite
def ladders(draw: st.DrawFn) -> list[dict[str, Any]]:
    drawn = draw(st.lists(rungs, max_size=3))
    bounds = [draw(shares) for _ in drawn[1:]] + [draw(st.one_of(shares, st.just("rest")))]
    ladder = [rung | {"capacity": bound} for rung, bound in zip(drawn, bounds, strict=False)]
    if ladder and ladder[-1]["capacity"] != "rest" and draw(st.booleans()):
        ladder.append({"tier": "evicted"})
    return ladder


overrides = st.fixed_dictionaries(
    {}, optional={**sides, "n_sink": st.integers(0, 500), "recent_window": st.integers(0, 500)}
).filter(bool)
tables = st.fixed_dictionaries(
    {},
    optional={
        "n_sink": st.integers(0, 500),
        "recent_window": st.integers(0, 500),
        "tile": st.sampled_from(range(16, 257, 16)),
        **sides,
        "ladder": ladders(),
        "policy": policies,
        "kernel": st.fixed_dictionaries({}, optional={"kind": st.sampled_from(["auto", "torch"])}),
        "layers": st.dictionaries(st.sampled_from(["0", "-1", "7", ":2", "-3:", "2:5"]), overrides, max_size=3),
        "observation_window": st.one_of(st.integers(1, 10**5), st.just("all")),
        "attention": st.sampled_from(["fade", "stock", "auto"]),
        "on_nonfinite": st.sampled_from(["raise", "zero"]),
        "telemetry": st.lists(
            st.fixed_dictionaries({"kind": st.just("jsonl"), "path": st.text(max_size=8)}), max_size=2
        ),
    },
)


def configured(table: dict[str, Any]) -> FadeConfig:
    """The configuration; examples in which two rungs come out with one name are passed over."""
    try:
        return FadeConfig(**table)
    except ConfigError as error:
        if " rungs are " not in str(error):
            raise
        reject()


property_test = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@property_test
@example(
    table={"telemetry": [{"kind": "jsonl", "path": "a\x85\u2028\ufeff b"}]}
)  # YAML takes some of these for line breaks
@given(table=tables)
def test_every_configuration_survives_every_format(table: dict[str, Any], tmp_path_factory: Any) -> None:
    config = configured(table)
    folder = tmp_path_factory.mktemp("formats")
    for extension in FORMATS:
        path = folder / f"fade.{extension}"
        config.to_file(path)
        assert FadeConfig.from_file(path) == config, path.read_text()
    assert FadeConfig(**config.to_dict()) == config == config.with_overrides()
    assert copy.deepcopy(config) == pickle.loads(pickle.dumps(config)) == config  # noqa: S301 (our own bytes)


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    with use_registry(Registry(entry_points=False)):
        return validator()


@property_test
@given(table=tables)
def test_the_schema_accepts_what_is_accepted_as_written_and_as_dumped(table: dict[str, Any], schema: Any) -> None:
    config = configured(table)
    schema.validate(table)
    schema.validate(json.loads(json.dumps(config.to_dict())))


@property_test
@given(table=tables, data=st.data())
def test_a_typo_anywhere_is_refused_by_name_and_by_the_schema(
    table: dict[str, Any], data: st.DataObject, schema: Any
) -> None:
    table = copy.deepcopy(table) | {"n_sink": 4}
    places = list(_tables_in(table))
    place = data.draw(st.sampled_from(range(len(places))))
    places[place]["budgett"] = 3
    with pytest.raises(ConfigError, match="unknown field 'budgett'"):
        FadeConfig(**table)
    assert not schema.is_valid(table)


def _tables_in(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The table itself and every component and override in it, but not ``layers``, whose keys are layers."""
    yield table
    for name, value in table.items():
        for inner in value.values() if name == "layers" else value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                yield from _tables_in(inner)


@property_test
@given(table=tables, layers=st.integers(8, 12))
def test_a_layer_has_its_own_configuration_and_nothing_else_changes(table: dict[str, Any], layers: int) -> None:
    table["layers"] = {key: table["layers"][key] for key in ("0", "-1") if key in table.get("layers", {})}
    config = configured(table)
    plain = config.with_overrides(layers={})
    for index in range(layers):
        own = config.for_layer(index, layers)
        override = config.layers.get({0: "0", layers - 1: "-1"}.get(index, ""))
        assert not own.layers
        if override is None:
            assert own == plain
            continue
        for name in ("n_sink", "recent_window", "keys", "values"):
            wanted = getattr(override, name)
            assert getattr(own, name) == (getattr(plain, name) if wanted is None else wanted)
        for rung, before in zip(own.resolved_ladder(), plain.resolved_ladder(), strict=True):
            full = before.name == "fp16" and before.keys == UniformConfig(bits=16)
            if not full:
                assert rung.keys == (override.keys or before.keys)
                assert rung.values == (override.values or before.values)
            assert rung.capacity == before.capacity


# --- the schema ---


def validator() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(FadeConfig.json_schema())


def test_the_schema_is_one_and_says_what_is_installed() -> None:
    schema = FadeConfig.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert set(schema["properties"]["policy"]["discriminator"]["mapping"]) == {"position", "h2o", "ema"}
    assert schema["properties"]["kernel"]
    assert validator().is_valid({})
    assert validator().is_valid(FadeConfig.aggressive().to_dict())
    assert validator().is_valid({"phase": "2", "int4_budget": 400, "middle_v_bits": 2})


def test_a_plugin_enters_the_schema_and_leaves_it() -> None:
    class Mine(PolicyConfig):
        kind: Literal["mine"] = "mine"
        depth: int = 3

    table = {"policy": {"kind": "mine", "depth": 4}}
    assert not validator().is_valid(table)
    with use_registry(Registry([provider("mine", "policies", Mine)], entry_points=False)):
        assert validator().is_valid(table)
        assert not validator().is_valid({"policy": {"kind": "mine", "height": 4}})
        assert FadeConfig(**table).policy == Mine(depth=4)
    assert not validator().is_valid(table)


@pytest.mark.parametrize(
    "table",
    [
        {"n_sink": -1},
        {"n_sink": "4"},
        {"tile": 65},
        {"keys": {"bits": 4}},
        {"policy": {"budget": 0.5}},
        {"policy": {"kind": "h2o", "budget": 0}},
        {"policy": {"kind": "nowhere"}},
        {"ladder": [{"tier": "int4", "capacity": 1.5}]},
        {"layers": {"first": {"n_sink": 3}}},
        {"observation_window": "some"},
        {"kernel": {"kind": "nowhere"}},
        {"telemetry": [{"kind": "jsonl"}]},
    ],
)
def test_the_schema_refuses_what_is_refused(table: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, UnknownComponentError)):
        FadeConfig(**table)
    assert not validator().is_valid(table)


# --- what is refused, and in which words ---

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "typo": ({"recent_windw": 3}, "unknown field 'recent_windw'; did you mean 'recent_window'? (known: n_sink, recent"),
    "typo of a flat name": ({"int4_bugdet": 3}, "did you mean 'int4_budget'"),
    "typo in a component": (
        {"policy": {"kind": "h2o", "bugdet": 1}},
        "policy: unknown field 'bugdet'; did you mean 'bu",
    ),
    "typo in a rung": ({"ladder": [{"tier": "int4", "capacty": 1}]}, "ladder.0: unknown field 'capacty'"),
    "typo in a layer": ({"layers": {"0": {"kyes": 1}}}, "layers.0: unknown field 'kyes'; did you mean 'keys'"),
    "negative sinks": ({"n_sink": -1}, "n_sink: input should be greater than or equal to 0; found -1"),
    "negative window": ({"recent_window": -64}, "recent_window"),
    "boolean": ({"n_sink": True}, "n_sink: true/false is not a value here; found True"),
    "boolean in a component": ({"policy": {"kind": "h2o", "every": True}}, "policy.every: true/false"),
    "boolean budget": ({"policy": {"kind": "h2o", "budget": True}}, "policy.budget: true/false"),
    "text": ({"n_sink": "4"}, "n_sink: input should be a valid integer; found '4'"),
    "NaN": ({"recent_window": float("nan")}, "recent_window"),
    "NaN budget": ({"policy": {"kind": "h2o", "budget": float("nan")}}, "policy.budget: a fraction lies above 0"),
    "infinite budget": ({"policy": {"kind": "h2o", "budget": float("inf")}}, "policy.budget: a fraction lies above 0"),
    "zero budget": ({"policy": {"kind": "h2o", "budget": 0}}, "policy.budget: a number of tokens must be at least 1"),
    "zero fraction": ({"policy": {"kind": "h2o", "budget": 0.0}}, "policy.budget: a fraction lies above 0"),
    "negative budget": (
        {"policy": {"kind": "h2o", "budget": -5}},
        "policy.budget: a number of tokens must be at least",
    ),
    "fractional tokens": ({"policy": {"kind": "h2o", "budget": 400.0}}, "tokens are whole numbers"),
    "budget below what stays": ({"policy": {"kind": "h2o", "budget": 67}}, "n_sink=4 and recent_window=64 make 68"),
    "budget below what stays in a layer": (
        {"policy": {"kind": "h2o", "budget": 100}, "layers": {"3": {"n_sink": 40}}},
        "n_sink=40 and recent_window=64 make 104",
    ),
    "rank at no step": ({"policy": {"kind": "position", "every": 0}}, "policy.every"),
    "decay": ({"policy": {"kind": "ema", "decay": 1.0}}, "policy.decay: input should be less than 1"),
    "zero capacity": ({"ladder": [{"tier": "int4", "capacity": 0}]}, "ladder.0.capacity: a number of tokens must be"),
    "capacity above all": ({"ladder": [{"tier": "int4", "capacity": 1.01}]}, "ladder.0.capacity: a fraction lies"),
    "capacity in words": ({"ladder": [{"tier": "int4", "capacity": "most"}]}, "or \"rest\" is needed; found 'most'"),
    "rest in the middle": ({"ladder": [{"tier": "int4"}, {"tier": "int2"}]}, "ladder.0: only the last rung may have"),
    "evicted in the middle": ({"ladder": [{"tier": "evicted"}, {"tier": "int4"}]}, "ladder.0: only the last rung may"),
    "bounded eviction": ({"ladder": [{"tier": "evicted", "capacity": 5}]}, "ladder.0.capacity: input should be 'rest'"),
    "nothing is kept": ({"ladder": [{"tier": "evicted"}]}, "no rung keeps a token"),
    "one rung twice": ({"ladder": [{"tier": "packed", "capacity": 9}, {"tier": "int4"}]}, "2 rungs are 'int4'"),
    "bits": (
        {"keys": {"kind": "uniform", "bits": 5}},
        "keys.bits: bits=5 cannot be stored; choose one of 2, 3, 4, 8, 16",
    ),
    "no bits": ({"keys": {"kind": "uniform", "bits": 0}}, "keys.bits"),
    "axis": (
        {"keys": {"kind": "uniform", "axis": "row"}},
        "keys.axis: input should be 'token' or 'channel'; found 'row'",
    ),
    "no kind": ({"keys": {"bits": 4}}, "keys: needs 'kind', one of kivi, uniform; found {'bits': 4}"),
    "kind is no text": ({"policy": {"kind": 3}}, "policy: needs 'kind', one of ema, h2o, position"),
    "component as text": (
        {"policy": "h2o"},
        "policy: a table with 'kind' is needed (one of ema, h2o, position); found",
    ),
    "component of another kind": ({"keys": H2OConfig()}, "keys: a table with 'kind' is needed"),
    "no component": ({"values": None}, "values: a table with 'kind' is needed"),
    "ladder as text": ({"ladder": "int4"}, "ladder: a list is needed; found 'int4'"),
    "layers as list": ({"layers": [1]}, "layers: a table of fields is needed; found [1]"),
    "layer in words": ({"layers": {"first": {"n_sink": 1}}}, 'layers.first: a layer is an index such as "0" or "-1"'),
    "layer with a sign": ({"layers": {"-0": {"n_sink": 1}}}, "layers.-0: a layer is an index"),
    "layer that says nothing": ({"layers": {"0": {}}}, "layers.0: overrides nothing; name one of keys, values, ladder"),
    "tile": ({"tile": 24}, "tile: input should be a multiple of 16; found 24"),
    "large tile": ({"tile": 272}, "tile: input should be less than or equal to 256"),
    "no tile": ({"tile": 0}, "tile: input should be greater than or equal to 16"),
    "no observation": ({"observation_window": 0}, 'observation_window: a number of queries (at least 1) or "all"'),
    "attention": ({"attention": "eager"}, "attention: input should be 'fade', 'stock' or 'auto'; found 'eager'"),
    "on_nonfinite": ({"on_nonfinite": "ignore"}, "on_nonfinite: input should be 'raise' or 'zero'"),
    "one sink, no list": ({"telemetry": {"kind": "jsonl", "path": "x"}}, "telemetry: a list is needed"),
    "sink without its field": ({"telemetry": [{"kind": "jsonl"}]}, "telemetry.0.path: this field is needed"),
    "kernel as text": ({"kernel": "torch"}, "kernel: a table of fields is needed; found 'torch'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused_in_plain_words(case: str) -> None:
    table, fragment = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        FadeConfig(**table)
    assert fragment in str(caught.value)
    assert "pydantic" not in str(caught.value)
    with pytest.raises(ConfigError):
        FadeConfig.model_validate(table)
    if case != "no kind":  # which an override need not repeat
        with pytest.raises(ConfigError):
            FadeConfig().with_overrides(**table)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        FadeConfig(n_sinc=3, tile=65, recent_window=True, policy={"kind": "h2o", "budget": -1, "evry": 3})
    lines = str(caught.value).splitlines()
    assert {line.split(":")[0] for line in lines} >= {"recent_window", "tile", "policy.budget", "policy"}
    assert any("unknown field 'n_sinc'" in line for line in lines)
    assert len(lines) == 5


def test_json_text_that_is_not_a_configuration_is_refused_too() -> None:
    assert FadeConfig.model_validate_json('{"n_sink": 3}').n_sink == 3
    with pytest.raises(ConfigError, match="n_sink"):
        FadeConfig.model_validate_json('{"n_sink": -3}')


@pytest.mark.parametrize(
    ("table", "known"),
    [
        ({"policy": {"kind": "h2"}}, "ema, h2o, position"),
        ({"keys": {"kind": "h2"}}, "kivi, uniform"),
        ({"ladder": [{"tier": "int5"}]}, "evicted, fp16, int2, int4, packed"),
        ({"telemetry": [{"kind": "x"}]}, "jsonl"),
        ({"kernel": {"kind": "triton"}}, "torch"),
    ],
)
def test_an_unknown_component_lists_the_known_ones(table: dict[str, Any], known: str) -> None:
    with pytest.raises(UnknownComponentError, match=f"known: {known}"):
        FadeConfig(**table)


def test_a_configuration_cannot_be_changed_in_place() -> None:
    config = FadeConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.n_sink = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.policy.every = 5  # type: ignore[misc]


# --- components ---


def test_a_mapping_becomes_the_component_and_an_object_stays_itself() -> None:
    assert FadeConfig(policy={"kind": "h2o", "budget": 0.5}).policy == H2OConfig(budget=0.5)
    policy = H2OConfig(budget=300)
    assert FadeConfig(policy=policy).policy is policy


def test_a_component_that_is_not_installed_may_be_given_as_an_object() -> None:
    class Mine(PolicyConfig):
        kind: Literal["mine"] = "mine"

    assert FadeConfig(policy=Mine()).policy == Mine()


def test_whole_and_fractional_budgets_stay_what_they_are(tmp_path: Path) -> None:
    for extension in FORMATS:
        for budget in (100, 1.0, 0.25):
            path = tmp_path / f"x.{extension}"
            FadeConfig(policy={"kind": "h2o", "budget": budget}).to_file(path)
            found = FadeConfig.from_file(path).policy.budget
            assert (type(found), found) == (type(budget), budget)


# --- ladders ---


def names(config: FadeConfig) -> list[str]:
    return [rung.name for rung in config.resolved_ladder()]


def test_without_a_ladder_there_is_one_rung_of_keys_and_values() -> None:
    (rung,) = FadeConfig().resolved_ladder()
    assert rung == ("int4", "rest", FadeConfig().keys, FadeConfig().values)
    keys, values = UniformConfig(bits=4, axis="channel"), UniformConfig(bits=2, group=32)
    (rung,) = FadeConfig(keys=keys, values=values).resolved_ladder()
    assert rung == ("k4v2", "rest", keys, values)
    assert names(FadeConfig(keys=UniformConfig(bits=16), values=UniformConfig(bits=16))) == ["fp16"]


def test_a_quantizer_of_a_plugin_may_have_any_width_or_none_yet() -> None:
    class Learnt(UniformConfig):
        kind: Literal["learnt"] = "learnt"  # type: ignore[assignment]
        bits: float | None = None  # type: ignore[assignment]

    def named(keys: float | None, values: float | None) -> list[str]:
        return names(FadeConfig(keys=Learnt.model_construct(bits=keys), values=Learnt.model_construct(bits=values)))

    assert [named(None, None), named(2.25, 2.25), named(3, 3)] == [["learnt"], ["2.25"], ["int3"]]
    assert [named(2.25, 1.5), named(None, 4)] == [["k2.25v1.5"], ["klearntv4"]]


def test_a_tier_decides_the_width_and_the_configuration_the_rest() -> None:
    config = FadeConfig(
        keys=UniformConfig(bits=8, axis="channel", group=16),
        ladder=[{"tier": "fp16", "capacity": 64}, {"tier": "int4", "capacity": 0.5}, {"tier": "int2", "capacity": 32}],
    )
    full, four, two = config.resolved_ladder()
    assert [full.name, four.name, two.name] == ["fp16", "int4", "int2"]
    assert [full.capacity, four.capacity, two.capacity] == [64, 0.5, 32]
    assert full.keys.bits == full.values.bits == 16
    assert four.keys == UniformConfig(bits=4, axis="channel", group=16)
    assert (two.keys, two.values) == (UniformConfig(bits=2, axis="channel", group=16), UniformConfig(bits=2))


def test_a_rung_may_name_its_own_quantizers() -> None:
    config = FadeConfig(ladder=[{"tier": "int4", "values": {"kind": "uniform", "bits": 3}}])
    (rung,) = config.resolved_ladder()
    assert (rung.name, rung.keys.bits, rung.values.bits) == ("k4v3", 4, 3)


@pytest.mark.parametrize(
    ("table", "evicts"),
    [
        ({}, False),
        ({"ladder": [{"tier": "int4", "capacity": 9}, {"tier": "int2"}]}, False),
        ({"ladder": [{"tier": "int4", "capacity": 9}]}, True),
        ({"ladder": [{"tier": "int4", "capacity": 9}, {"tier": "evicted"}]}, True),
        ({"policy": {"kind": "position", "budget": 0.5}}, True),
    ],
)
def test_whether_tokens_are_dropped(table: dict[str, Any], evicts: bool) -> None:
    config = FadeConfig(**table)
    assert config.evicts is evicts
    assert all(rung.name != "evicted" for rung in config.resolved_ladder())


def test_a_quantizer_that_cannot_have_a_tiers_width_is_reported_with_the_configuration() -> None:
    class Stubborn(UniformConfig):
        def with_bits(self, bits: int) -> UniformConfig:
            if bits == 2:
                raise ConfigError("this quantizer has no 2 bits")
            return super().with_bits(bits)

    with pytest.raises(ConfigError, match="no 2 bits"):
        FadeConfig(keys=Stubborn(), ladder=[{"tier": "int4", "capacity": 9}, {"tier": "int2"}])


def test_a_tier_of_a_plugin_takes_its_place(tmp_path: Path) -> None:
    class Mine(TierConfig):
        tier: Literal["mine"] = "mine"
        width: int = 8

        def quantizers(self, keys: Any, values: Any) -> Any:
            return keys.with_bits(self.width), values.with_bits(self.width)

    with use_registry(Registry([provider("mine", "tiers", Mine)], entry_points=False)):
        config = FadeConfig(ladder=[{"tier": "mine", "capacity": 9, "width": 3}, {"tier": "int2"}])
        assert names(config) == ["mine", "int2"]
        assert config.resolved_ladder()[0].keys.bits == 3
        config.to_file(tmp_path / "fade.toml")
        assert FadeConfig.from_file(tmp_path / "fade.toml") == config


# --- layers ---


def test_layers_are_named_by_index_from_either_end_or_by_slice() -> None:
    config = FadeConfig(layers={0: {"n_sink": 10}, "-1": {"n_sink": 11}, "2:4": {"n_sink": 12}})
    assert [config.for_layer(i, 6).n_sink for i in range(6)] == [10, 4, 12, 12, 4, 11]
    config = FadeConfig(layers={":2": {"n_sink": 10}, "-2:": {"n_sink": 11}})
    assert [config.for_layer(i, 5).n_sink for i in range(5)] == [10, 10, 4, 11, 11]


@pytest.mark.parametrize(
    ("layers", "count", "fragment"),
    [
        (["1", "-1"], 2, "layers '1' and '-1' both name layer 1"),
        (["0", ":2"], 4, "layers '0' and ':2' both name layer 0"),
        (["7"], 4, "layers '7' names no layer of this model, which has 4"),
        (["-5"], 4, "layers '-5' names no layer"),
        (["4:"], 4, "layers '4:' names no layer"),
    ],
)
def test_layers_that_do_not_fit_the_model_are_refused(layers: list[str], count: int, fragment: str) -> None:
    config = FadeConfig(layers={key: {"n_sink": 1} for key in layers})
    with pytest.raises(ConfigError, match=fragment):
        config.for_layer(0, count)


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_a_layer_that_the_model_does_not_have_is_refused(index: int) -> None:
    with pytest.raises(ConfigError, match=f"layer {index} does not exist"):
        FadeConfig().for_layer(index, 4)


def test_a_layers_quantizers_hold_on_every_rung_and_its_ladder_replaces_the_other() -> None:
    config = FadeConfig(
        ladder=[{"tier": "int4", "capacity": 0.5}, {"tier": "int2"}],
        layers={
            "0": {"keys": {"kind": "uniform", "bits": 8}},
            "1": {"ladder": [{"tier": "fp16"}], "recent_window": 0},
        },
    )
    assert names(config.for_layer(0, 3)) == ["k8v4", "k8v2"]
    assert names(config.for_layer(1, 3)) == ["fp16"]
    assert config.for_layer(1, 3).recent_window == 0
    assert names(config.for_layer(2, 3)) == ["int4", "int2"]


def test_a_layers_ladder_is_checked_with_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"layers.0.ladder.0: only the last rung"):
        FadeConfig(layers={"0": {"ladder": [{"tier": "int4"}, {"tier": "int2"}]}})


# --- the flat spelling ---

FLAT: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"phase": "1a"}, {}),
    ({"phase": "1a", "n_sink": 2, "recent_window": 32}, {"n_sink": 2, "recent_window": 32}),
    (
        {"phase": "2", "int4_budget": 400},
        {"ladder": [{"tier": "packed", "capacity": 400}], "policy": {"kind": "h2o"}},
    ),
    ({"int4_budget": 400}, {"ladder": [{"tier": "packed", "capacity": 400}], "policy": {"kind": "h2o"}}),
    (
        {"phase": "2", "int4_budget": 400, "int2_budget": 100, "eviction_policy": "ema", "reassign_every": 16},
        {
            "ladder": [{"tier": "packed", "capacity": 400}, {"tier": "int2", "capacity": 100}],
            "policy": {"kind": "ema", "every": 16},
        },
    ),
    (
        {"phase": "2", "int4_budget": 0, "int2_budget": 100, "int2_group_size": 32, "eviction_policy": "position"},
        {
            "ladder": [
                {
                    "tier": "int2",
                    "capacity": 100,
                    "keys": {"kind": "uniform", "bits": 2, "axis": "channel", "group": 32},
                }
            ]
        },
    ),
    (
        {"middle_k_bits": 2, "middle_v_bits": 8},
        {"keys": UniformConfig(bits=2, axis="channel"), "values": UniformConfig(bits=8)},
    ),
    ({"quant_backend": "int4"}, {}),
    ({"eviction_policy": "h2o"}, {"policy": {"kind": "h2o"}}),
    ({"reassign_every": 7}, {"policy": {"kind": "position", "every": 7}}),
    ({"prefill_track_limit": 1024}, {"observation_window": 1024}),
    ({"int2_group_size": 64}, {}),
    # the same thing said twice
    ({"middle_k_bits": 8, "keys": {"kind": "uniform", "bits": 8}}, {"keys": {"kind": "uniform", "bits": 8}}),
    ({"middle_k_bits": 8, "keys": {"kind": "uniform"}}, {"keys": {"kind": "uniform", "bits": 8}}),
    ({"middle_k_bits": 8, "keys": UniformConfig(axis="channel")}, {"keys": UniformConfig(bits=8, axis="channel")}),
    ({"eviction_policy": "h2o", "policy": {"budget": 0.5}}, {"policy": {"kind": "h2o", "budget": 0.5}}),
    (
        {"int4_budget": 400, "ladder": [{"tier": "packed", "capacity": 400}]},
        {"ladder": [{"tier": "packed", "capacity": 400}], "policy": {"kind": "h2o"}},
    ),
    (
        {"int4_budget": 400, "policy": {"kind": "ema"}},
        {"ladder": [{"tier": "packed", "capacity": 400}], "policy": {"kind": "ema"}},
    ),
    ({"prefill_track_limit": 9, "observation_window": 9}, {"observation_window": 9}),
    (
        {"phase": "1a", "ladder": [{"tier": "int4", "capacity": 9}, {"tier": "int2"}]},
        {"ladder": [{"tier": "int4", "capacity": 9}, {"tier": "int2"}]},
    ),
]


@pytest.mark.parametrize(("flat", "nested"), FLAT)
def test_the_flat_spelling_means_the_same(flat: dict[str, Any], nested: dict[str, Any], tmp_path: Path) -> None:
    assert FadeConfig(**flat) == FadeConfig(**nested)
    if all(isinstance(value, (int, str)) for value in flat.values()):
        for extension in FORMATS:
            write_table(tmp_path / f"flat.{extension}", flat)
            assert FadeConfig.from_file(tmp_path / f"flat.{extension}") == FadeConfig(**nested)
        validator().validate(flat)


def test_the_rotated_backend_is_the_rotated_quantizer() -> None:
    class Rotated(UniformConfig):
        kind: Literal["rotated"] = "rotated"  # type: ignore[assignment]

    for backend in ("turbo", "rotated"):
        with pytest.raises(UnknownComponentError, match="pip install fade-quant-rotated"):
            FadeConfig(quant_backend=backend)
        with use_registry(Registry([provider("rotated", "quantizers", Rotated)], entry_points=False)):
            config = FadeConfig(quant_backend=backend, middle_v_bits=2)
            assert (config.keys, config.values) == (Rotated(bits=4), Rotated(bits=2))


MIXED = [
    ({"middle_k_bits": 4, "keys": {"kind": "uniform", "bits": 8}}, ["middle_k_bits", "keys.bits"]),
    ({"middle_v_bits": 4, "values": UniformConfig(bits=8)}, ["middle_v_bits", "values.bits"]),
    ({"quant_backend": "rotated", "keys": {"kind": "uniform"}}, ["quant_backend", "keys.kind"]),
    ({"eviction_policy": "h2o", "policy": PositionConfig()}, ["eviction_policy", "policy.kind"]),
    ({"reassign_every": 3, "policy": {"kind": "h2o", "every": 4}}, ["reassign_every", "policy.every"]),
    ({"prefill_track_limit": 3, "observation_window": 4}, ["prefill_track_limit", "observation_window"]),
    ({"int4_budget": 3, "ladder": [{"tier": "int4", "capacity": 4}]}, ["int4_budget", "ladder"]),
    ({"phase": "1a", "ladder": [{"tier": "int4", "capacity": 4}]}, ["phase", "ladder"]),
    ({"phase": "1a", "policy": {"kind": "h2o", "budget": 0.5}}, ["phase", "policy.budget"]),
    ({"phase": "1a", "int4_budget": 400}, ["phase", "int4_budget"]),
    ({"phase": "1a", "int2_budget": 400}, ["phase", "int2_budget"]),
    ({"phase": "2"}, ["phase", "int4_budget", "int2_budget"]),
    ({"phase": "2", "int4_budget": 0}, ["int4_budget=0", "above 0"]),
    ({"int2_budget": 100}, ["int2_budget", "int4_budget"]),
    ({"int4_budget": 400, "int2_group_size": 32}, ["int2_group_size", "int2_budget"]),
    (
        {"int4_budget": 9, "int2_budget": 9, "int2_group_size": 16, "keys": UniformConfig()},
        ["int2_group_size", "channel"],
    ),
    ({"int4_budget": 9, "int2_budget": 9, "middle_k_bits": 2, "middle_v_bits": 2}, ["2 rungs are 'int2'"]),
    ({"int4_budget": -1}, ["int4_budget", "-1"]),
    ({"int4_budget": True}, ["int4_budget", "true/false"]),
    ({"int4_budget": 0.5}, ["int4_budget", "0.5"]),
    ({"reassign_every": 0}, ["reassign_every"]),
    ({"prefill_track_limit": 0}, ["prefill_track_limit"]),
    ({"phase": "3"}, ["phase", "'1a' or '2'"]),
    ({"quant_backend": "int8"}, ["quant_backend", "'int4'"]),
    ({"middle_k_bits": 5}, ["keys.bits", "2, 3, 4, 8, 16"]),
    ({"int4_budget": 9, "ladder": 3}, ["ladder", "list"]),
]


@pytest.mark.parametrize(("table", "fragments"), MIXED)
def test_flat_names_that_contradict_are_refused_naming_both(table: dict[str, Any], fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        FadeConfig(**table)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_every_flat_name_changes_something() -> None:
    shown = {name for flat, nested in FLAT if FadeConfig(**nested) != FadeConfig() for name in flat}
    assert set(NAMES) - shown == {"quant_backend"}  # the test before the last


# --- overrides ---


def test_overrides_change_what_they_name_and_keep_the_rest() -> None:
    config = FadeConfig(policy={"kind": "ema", "budget": 0.5, "decay": 0.9}, recent_window=32)
    assert config.with_overrides(n_sink=0).n_sink == 0
    changed = config.with_overrides(policy={"budget": 0.25})
    assert changed == FadeConfig(policy={"kind": "ema", "budget": 0.25, "decay": 0.9}, recent_window=32)
    replaced = config.with_overrides(policy={"kind": "ema", "budget": 0.25})
    assert replaced == FadeConfig(policy={"kind": "ema", "budget": 0.25}, recent_window=32)
    assert config.with_overrides(kernel={"kind": "torch"}).kernel.kind == "torch"


def test_overrides_take_flat_names_relative_to_what_is_there() -> None:
    config = FadeConfig(values=UniformConfig(bits=4, group=32), policy={"kind": "ema", "budget": 0.5, "every": 9})
    assert config.with_overrides(middle_v_bits=2).values == UniformConfig(bits=2, group=32)
    switched = config.with_overrides(eviction_policy="h2o")
    assert switched.policy == H2OConfig(budget=0.5, every=9)  # what every policy has is kept
    bounded = config.with_overrides(int4_budget=400)
    assert bounded.policy == config.policy
    assert bounded.ladder[0].capacity == 400
    assert bounded.with_overrides(int4_budget=200).ladder[0].capacity == 200
    assert not bounded.with_overrides(phase="1a").evicts
    assert FadeConfig().with_overrides(phase="2", int4_budget=400) == FadeConfig(phase="2", int4_budget=400)


def test_overrides_are_checked() -> None:
    with pytest.raises(ConfigError, match="did you mean 'n_sink'"):
        FadeConfig().with_overrides(n_sinc=3)
    with pytest.raises(ConfigError, match="make 504"):
        FadeConfig(policy={"kind": "h2o", "budget": 100}).with_overrides(recent_window=500)


# --- presets ---


def test_presets_are_ordered_by_what_they_keep() -> None:
    safe, balanced, aggressive = FadeConfig.safe(), FadeConfig.balanced(), FadeConfig.aggressive()
    assert safe == FadeConfig()
    assert not safe.evicts
    widths = [c.keys.bits + c.values.bits for c in (safe, balanced, aggressive)]
    assert widths == sorted(widths, reverse=True)
    assert len({str(c) for c in (safe, balanced, aggressive)}) == 3


# --- files ---

MANY = "more than 5,000 values, which no configuration has"
KEYS = {
    "yaml": "".join(f"k{i}: 1\n" for i in range(6000)),
    "json": json.dumps({f"{i}": 1 for i in range(5500)}, separators=(",", ":")),
    "toml": "".join(f"k{i} = 1\n" for i in range(3000)),
}
WRONG_FILES = {
    "missing.toml": (None, "no such file"),
    "empty.toml": ("", "the file is empty"),
    "blank.yaml": (" \n\n", "the file is empty"),
    "json.toml": ('{"n_sink": 4}', "not valid TOML"),
    "toml.json": ("n_sink = 4", "not valid JSON"),
    "toml.yaml": ("n_sink = 4", "a table of fields is needed; found str 'n_sink = 4'"),
    "list.json": ("[1, 2]", "a table of fields is needed; found list"),
    "comment.yaml": ("# nothing\n", "a table of fields is needed; found NoneType"),
    "tabs.yaml": ("n_sink:\n\t- 4", "not valid YAML"),
    "tag.yaml": ("n_sink: !!python/object/apply:os.getcwd []", "not valid YAML"),
    "twice.toml": ("n_sink = 4\nn_sink = 5", "not valid TOML"),
    "twice.yaml": ("n_sink: 4\nn_sink: 5", "'n_sink' is written twice"),
    "twice.json": ('{"n_sink": 4, "n_sink": 5}', "'n_sink' is written twice"),
    "nan.json": ('{"policy": {"kind": "h2o", "budget": NaN}}', "policy.budget: a fraction lies above 0"),
    "typo.toml": ("n_sinc = 4", "did you mean 'n_sink'"),
    "fade.ini": ("n_sink = 4", "the extension '.ini' names no format; use one of .toml, .yaml, .yml, .json"),
    "fade": ("n_sink = 4", "names no format"),
    "deep.json": ("[" * 100_000, "not valid JSON"),
    "deeper.json": ('{"keys":' * 5000, "not valid JSON"),
    "deep.yaml": ("[" * 60_000, "nested more than 32 deep"),
    "large.yaml": ("n_sink: " + "x" * 70_000, "larger than 64 KiB"),
    "itself.yaml": ("keys: &k {kind: uniform, again: *k}", "an alias stands for what it is part of"),
    "doubling.yaml": ("a: &a0 [x, x]\n" + "".join(f"k{i}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)), MANY),
    "list.yaml": ("- &a0 [x, x]\n" + "".join(f"- &a{i + 1} [*a{i}, *a{i}]\n" for i in range(40)), MANY),
    "merged.yaml": ("a: &a0 {b: 4}\n" + "".join(f"k{i}: &a{i + 1} {{<<: [*a{i}, *a{i}]}}\n" for i in range(40)), MANY),
    **{f"keys.{kind}": (table, "and" if kind == "toml" else MANY) for kind, table in KEYS.items()},
    "number.yaml": ("1: 2", "unknown field 1"),
    "tuple.yaml": ("? [1, 2]\n: 3", "a key is text or a number"),
    "nowhere.yaml": ("layers: {null: {n_sink: 3}}", "a layer is an index"),
    "null.yaml": ("n_sink: !!map [4]", "a table is needed here"),
    **{f"{tag}.yaml": (f"n_sink: !!{tag} 'zz'", f"this is no {tag}") for tag in ("int", "float", "bool")},
    "blank-int.yaml": ("n_sink: !!int ''", "this is no int"),
    **{f"{tag}.yaml": (f"n_sink: !!{tag} zz", "not valid YAML") for tag in ("timestamp", "binary", "set", "omap")},
    "date.yaml": ("n_sink: 2001-99-99", "found '2001-99-99'"),  # text: no configuration holds a date
    "digits.json": ('{"n_sink": ' + "9" * 5000 + "}", "not valid JSON"),
    "digits.yaml": ("n_sink: 0x" + "f" * 9000, "found a number of 36000 bits"),
    "layer.toml": (f"[layers.'{'9' * 5000}']\nn_sink = 3", "a layer is an index"),
    "name.toml": (f"[keys]\nkind = '{'a' * 50_000}'", "unknown quantizer 'aaa"),
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_file_that_is_no_configuration_is_refused_by_name(tmp_path: Path, name: str) -> None:
    text, fragment = WRONG_FILES[name]
    path = tmp_path / name
    if text is not None:
        path.write_text(text)
    started = time.process_time()
    with pytest.raises((ConfigError, UnknownComponentError)) as caught:
        FadeConfig.from_file(path)
    assert time.process_time() - started < 1
    assert fragment in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) <= 2000


def test_bytes_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.toml").write_bytes(b"n_sink = 4 # \xff\xfe")
    (tmp_path / "folder.toml").mkdir()
    for name in ("bytes.toml", "folder.toml"):
        with pytest.raises(ConfigError, match="cannot be read as TOML"):
            FadeConfig.from_file(tmp_path / name)


def test_errors_of_components_name_the_file_and_keep_their_type(tmp_path: Path) -> None:
    path = tmp_path / "fade.toml"
    path.write_text('policy = { kind = "nowhere" }')
    with pytest.raises(UnknownComponentError, match=r"fade.toml: unknown policy 'nowhere'"):
        FadeConfig.from_file(path)
    path.write_text('policy = { kind = "h2o" }')
    thief = provider("thief", "policies", type("Mine", (H2OConfig,), {"__module__": __name__}))
    with (
        use_registry(Registry([thief], entry_points=False)),
        pytest.raises(PluginError, match=r"fade.toml: policy 'h2o'"),
    ):
        FadeConfig.from_file(path)


def test_an_unknown_component_does_not_hide_what_else_is_wrong() -> None:
    with pytest.raises(UnknownComponentError) as caught:
        FadeConfig(
            n_sink=-1,
            tyle=16,
            keys={"kind": "nowhere"},
            kernel={"kind": "nobody"},
            ladder=[{"tier": "int4"}, {"tier": "none"}],
            layers={"3": {"values": {"kind": "unifrom"}, "n_sink": 1.5}},
        )
    assert isinstance(caught.value, ConfigError)
    for expected in (
        "n_sink: input should be greater than or equal to 0; found -1",
        "did you mean 'tile'",
        r"unknown quantizer 'nowhere' .* \(in keys\)",
        r"unknown kernel 'nobody' .* \(in kernel.kind\)",
        r"unknown tier 'none'.* \(in ladder.1\)",
        r"unknown quantizer 'unifrom'; did you mean 'uniform'.* \(in layers.3.values\)",
        "layers.3.n_sink: input should be a valid integer",
    ):
        assert re.search(expected, str(caught.value)), expected
    again = copy.copy(caught.value)  # as between processes
    assert (type(again), str(again)) == (type(caught.value), str(caught.value))


def test_no_message_is_longer_than_a_page_and_its_end_says_what_works() -> None:
    with pytest.raises(ConfigError, match=r"and 2,992 more problems$") as caught:
        FadeConfig(**{f"k{i}" * 60: i for i in range(3000)})
    assert len(str(caught.value)) <= 2000
    with pytest.raises(ConfigError, match=r"keep one of them$") as caught:
        FadeConfig(int4_budget=4, ladder=[{"tier": "packed", "capacity": 5}] * 900)
    assert len(str(caught.value)) <= 2000


@pytest.mark.parametrize(
    "fields",
    [
        {"n_sink": 2**31},
        {"recent_window": 10**30},
        {"policy": {"kind": "h2o", "budget": 10**30}},
        {"policy": {"kind": "h2o", "every": 2**31}},
        {"policy": {"kind": "h2o", "budget": "99999999999GiB"}},
        {"ladder": [{"tier": "int4", "capacity": 10**30}]},
        {"observation_window": 2**31},
        {"layers": {"100000": {"n_sink": 3}}},
        {"layers": {"0\n": {"n_sink": 3}}},
    ],
)
def test_numbers_that_no_token_can_have_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="found"):
        FadeConfig(**fields)


def test_a_file_that_cannot_be_written_is_an_error_by_name(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "no" / "where.toml", "No such file or directory"),
        (tmp_path / f"{'x' * 300}.toml", "File name too long"),
        (tmp_path / "nul\0.toml", "null"),
    ):
        with pytest.raises(ConfigError, match=f"cannot be written: .*{reason}"):
            FadeConfig().to_file(path)
    assert not list(tmp_path.iterdir())


def test_a_byte_order_mark_and_layers_as_numbers_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "fade.yaml"
    path.write_text("\ufeffn_sink: 7\nlayers:\n  -1: {n_sink: 8}\n", encoding="utf-8")
    assert FadeConfig.from_file(path).for_layer(3, 4).n_sink == 8
    assert FadeConfig.from_file(str(path)).n_sink == 7


def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    class Mine(PolicyConfig):
        kind: Literal["mine"] = "mine"
        depth: int | None = 3

    config = FadeConfig(policy=Mine(depth=None))
    with pytest.raises(ConfigError, match=r"TOML has no null, which policy.depth is"):
        config.to_file(tmp_path / "fade.toml")
    assert not (tmp_path / "fade.toml").exists()
    with use_registry(Registry([provider("mine", "policies", Mine)], entry_points=False)):
        for extension in ("yaml", "json"):
            config.to_file(tmp_path / f"fade.{extension}")
            assert FadeConfig.from_file(tmp_path / f"fade.{extension}") == config
    with pytest.raises(ConfigError, match="names no format"):
        config.to_file(tmp_path / "fade.txt")


def test_a_table_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = {"text": "ä\n'\"", "list": [1, 2.5, True, {"a": []}], "table": {"": "empty key", "2": 3}}
    for extension in FORMATS:
        write_table(tmp_path / f"x.{extension}", table)
        assert read_table(tmp_path / f"x.{extension}") == table
