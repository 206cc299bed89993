"""``FadeConfig``: everything about a compressed cache, from Python, TOML, YAML or JSON."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from fade_core.builtin.policies.position import PositionConfig
from fade_core.builtin.presets import AGGRESSIVE, BALANCED, SAFE
from fade_core.builtin.quantizers.uniform import UniformConfig
from fade_core.builtin.tiers import PackedTier, QuantizedTier
from fade_core.config.files import read_table, write_table
from fade_core.config.flat_spelling import NAMES, Defaults, FlatSpelling, changed, nest
from fade_core.config.kernel_selection import KernelSelection
from fade_core.errors import ConfigError
from fade_core.interfaces import ComponentConfig, Preset, QuantizerConfig, TierConfig
from fade_core.plugins import default_registry
from fade_core.plugins.resolve import AnyPolicy, AnyQuantizer, AnyRope, AnySink, AnyTier
from fade_core.support.validation import Capacity, CheckedModel, InvalidConfigError, WholeNumber, Window, shown

LAYER_KEY = r"^(0|-?[1-9][0-9]{0,4}|(0|-?[1-9][0-9]{0,4})?:(0|-?[1-9][0-9]{0,4})?)$"
"""A layer index ("0", "-1") or a slice of them (":2", "-2:")."""


class Rung(NamedTuple):
    """One rung of a layer's ladder, defaults and overrides resolved.

    Attributes:
        name: what reports call it ("int4", "k4v2").
        capacity: tokens (int), a fraction of the context (float), or "rest".
        keys: quantizer configuration of the keys.
        values: quantizer configuration of the values.
    """

    name: str
    capacity: Capacity
    keys: QuantizerConfig
    values: QuantizerConfig


def _layer_key(key: Any) -> str:
    if not isinstance(key, str) or not re.match(LAYER_KEY, key) or key.endswith("\n"):
        raise ValueError(
            f'a layer is an index such as "0" or "-1", or a slice such as ":2" or "-2:"; found {shown(key)}'
        )
    return key


def _text_keys(layers: Any) -> Any:
    if not isinstance(layers, Mapping):
        return layers
    return {str(key) if type(key) is int else key: value for key, value in layers.items()}


class LayerOverride(CheckedModel):
    """What one layer does differently; fields that are left out follow the configuration.

    Attributes:
        keys: quantizer of this layer's keys, on every rung made of quantizers (its width included).
        values: quantizer of this layer's values, likewise.
        ladder: rungs of this layer.
        n_sink: sink tokens of this layer.
        recent_window: window of this layer.
    """

    keys: AnyQuantizer | None = None
    values: AnyQuantizer | None = None
    ladder: tuple[AnyTier, ...] | None = None
    n_sink: WholeNumber | None = None
    recent_window: WholeNumber | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if all(getattr(self, name) is None for name in type(self).model_fields):
            raise ValueError(f"overrides nothing; name one of {', '.join(type(self).model_fields)}")
        return self


class FadeConfig(CheckedModel):
    """Everything about a compressed cache. Frozen; unknown fields are refused.

    Component fields take a configuration object or a mapping with its ``kind`` (``tier`` for rungs); anything that is
    installed can be named. The flat spelling (``fade_core.config.flat_spelling``) is accepted as well and means the same.

    Attributes:
        n_sink: first tokens of a row that always stay in full precision.
        recent_window: newest tokens that always stay in full precision.
        tile: tokens that are encoded together; a multiple of 16, at most 256.
        keys: quantizer of the packed keys.
        values: quantizer of the packed values.
        ladder: rungs from finest to coarsest; empty for one unbounded rung made of ``keys`` and ``values``.
        policy: ranks the tokens; its ``budget`` bounds what is kept.
        kernel: implementation of each op.
        layers: overrides by layer ("0", "-1", ":2"); no two may name the same layer.
        observation_window: last queries of a prefill whose attention the policy's statistics see, or "all".
        attention: "fade" reads packed tiers in place, "stock" leaves the model's attention, "auto" takes "fade" where
            the model allows it.
        reposition: where survivors of an eviction are read: "keep" at their own positions, "contiguous" side by side up to
            the query (StreamingLLM, arXiv 2309.17453). What is stored is the same.
        rope: rotary embedding that "contiguous" moves keys with; ``None`` reads it off the model's config.
        on_nonfinite: "raise" refuses NaN or infinity among keys and values, "zero" stores zeros for them.
        telemetry: sinks that receive the cache's events.

    Raises:
        ConfigError: with one line a problem.
        UnknownComponentError: for a ``kind`` that nothing installed provides.
        PluginError: for a ``kind`` that two plugins provide.
    """

    n_sink: WholeNumber = 4
    recent_window: WholeNumber = 64
    tile: Annotated[int, Field(strict=True, ge=16, le=256, multiple_of=16)] = 64
    keys: AnyQuantizer = UniformConfig(bits=4, axis="channel")
    values: AnyQuantizer = UniformConfig(bits=4, axis="token")
    ladder: tuple[AnyTier, ...] = ()
    policy: AnyPolicy = PositionConfig()
    kernel: KernelSelection = KernelSelection()
    layers: Annotated[
        dict[Annotated[str, Field(pattern=LAYER_KEY), BeforeValidator(_layer_key)], LayerOverride],
        BeforeValidator(_text_keys),
        Field(default_factory=dict, json_schema_extra={"additionalProperties": False}),
    ]
    observation_window: Window = 64
    attention: Literal["fade", "stock", "auto"] = "auto"
    reposition: Literal["keep", "contiguous"] = "keep"
    rope: AnyRope | None = None
    on_nonfinite: Literal["raise", "zero"] = "raise"
    telemetry: tuple[AnySink, ...] = ()

    other_names: ClassVar[tuple[str, ...]] = NAMES

    def __init__(self, /, **data: Any) -> None:
        super().__init__(**data)

    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    # --- presets ---
    @classmethod
    def preset(cls, name: str) -> Self:
        """The configuration that a plugin, or the core, brings under ``name``; ``fade config list`` shows all.

        Raises:
            UnknownComponentError: for a name that nothing installed brings; the message says what would.
        """
        found: Preset = default_registry().get("presets", name)
        return cls(**found.fields)

    @classmethod
    def safe(cls) -> Self:
        """K and V at 4 bits, nothing evicted: the defaults."""
        return cls(**SAFE.fields)

    @classmethod
    def balanced(cls) -> Self:
        """Smaller than ``safe`` at a small price; see ``fade_core.builtin.presets``."""
        return cls(**BALANCED.fields)

    @classmethod
    def aggressive(cls) -> Self:
        """The smallest cache of the core that still reads well; see ``fade_core.builtin.presets``."""
        return cls(**AGGRESSIVE.fields)

    # --- files ---
    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a ``.toml``, ``.yaml``, ``.yml`` or ``.json`` file. Every error names the file."""
        table = read_table(path)
        try:
            return cls.model_validate(table)
        except InvalidConfigError as error:
            raise type(error)(error.problems, f"{path}: ") from error

    def to_file(self, path: str | Path) -> None:
        """Write the configuration in the format of the extension; ``from_file`` gives back an equal one."""
        write_table(path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain tables, lists, strings and numbers; fields that are ``None`` by default and still are stay out."""
        return _plain(self)

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema (Draft 2020-12) of what is installed, the flat spelling included."""
        schema = cls.model_json_schema()
        other = FlatSpelling.model_json_schema()["properties"]
        for name, described in other.items():
            schema["properties"][name] = described | {"description": "flat spelling", "deprecated": True}
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    # --- derived configurations ---
    def with_overrides(self, **fields: Any) -> Self:
        """A copy with ``fields`` changed and everything validated again.

        A component given without its ``kind`` changes only the fields it names: ``policy={"budget": 0.5}``. Flat names
        change what they mean in this configuration: ``middle_v_bits=2``.
        """
        current = {name: getattr(self, name) for name in type(self).model_fields}
        wanted = nest(fields, Defaults(self.keys, self.values, self.policy, self.ladder, fresh=False))
        for name, value in wanted.items():
            held = current.get(name)
            if isinstance(value, Mapping) and isinstance(held, ComponentConfig) and "kind" not in value:
                wanted[name] = changed(held, value)
        return type(self)(**(current | wanted))

    def for_layer(self, index: int, num_layers: int) -> Self:
        """The configuration that holds in one layer: its overrides applied, ``layers`` empty.

        Raises:
            ConfigError: if ``layers`` names a layer that the model does not have, or one layer twice.
        """
        if not 0 <= index < num_layers:
            raise ConfigError(f"layer {index} does not exist: the model has layers 0 to {num_layers - 1}")
        owners = self.overridden_layers(num_layers)
        return self._overridden(self.layers[owners[index]] if index in owners else None)

    def overridden_layers(self, num_layers: int) -> dict[int, str]:
        """Layers that ``layers`` names, with the key that does.

        Raises:
            ConfigError: as ``for_layer``.
        """
        owners: dict[int, str] = {}
        for key in self.layers:
            for layer in _layers_of(key, num_layers):
                if layer in owners:
                    raise ConfigError(f"layers {owners[layer]!r} and {key!r} both name layer {layer}; keep one of them")
                owners[layer] = key
        return owners

    def resolved_ladder(self) -> tuple[Rung, ...]:
        """Rungs in order, without "evicted": what does not fit into the last one is evicted."""
        rungs = []
        for tier in self.ladder or (PackedTier(),):
            quantizers = tier.quantizers(self.keys, self.values)
            if quantizers is not None:
                rungs.append(Rung(tier.label(*quantizers), tier.capacity, *quantizers))
        return tuple(rungs)

    @property
    def evicts(self) -> bool:
        """Whether tokens are ever dropped, by ``policy.budget`` or by a bounded ladder (layer overrides aside)."""
        last = self.ladder[-1] if self.ladder else PackedTier()
        return self.policy.budget is not None or last.capacity != "rest" or last.tier == "evicted"

    # --- validation ---
    @model_validator(mode="before")
    @classmethod
    def _nested(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        default = {name: cls.model_fields[name].default for name in ("keys", "values", "policy")}
        return nest(data, Defaults(**default))

    @model_validator(mode="after")
    def _ladders_work(self) -> Self:
        _check_ladder(self, "ladder")
        for key, override in self.layers.items():
            _check_ladder(self._overridden(override), f"layers.{key}.ladder")
        return self

    def _overridden(self, override: LayerOverride | None) -> Self:
        update: dict[str, Any] = {"layers": {}}
        if override is not None:
            update |= {name: getattr(override, name) for name in type(override).model_fields}
            update = {name: value for name, value in update.items() if value is not None}
            if override.ladder is None:
                own = {"keys": override.keys, "values": override.values}
                own = {name: value for name, value in own.items() if value is not None}
                update["ladder"] = tuple(
                    tier.model_copy(update=own) if isinstance(tier, QuantizedTier) else tier for tier in self.ladder
                )
        return self.model_copy(update=update)


def _check_ladder(config: FadeConfig, path: str) -> None:
    """Refuse a ladder that cannot be filled in order, or a budget that cannot be kept. Raises ``ConfigError``."""
    budget, kept = config.policy.budget, config.n_sink + config.recent_window
    if config.policy.schedule is not None and budget is None:
        raise ConfigError("policy.schedule shares out a budget among layers; write policy.budget as well")
    if isinstance(budget, int) and budget < kept:
        raise ConfigError(
            f"policy.budget={budget} tokens is less than what always stays: n_sink={config.n_sink} and "
            f"recent_window={config.recent_window} make {kept}"
        )
    for place, tier in enumerate(config.ladder):
        if place < len(config.ladder) - 1 and tier.capacity == "rest":
            raise ConfigError(
                f'{path}.{place}: only the last rung may have capacity "rest"; give tier {tier.tier!r} a number of '
                f"tokens or a fraction"
            )
    names = [rung.name for rung in config.resolved_ladder()]
    if not names:
        raise ConfigError(
            f"{path}: no rung keeps a token; to keep sinks and window alone write "
            f'policy = {{kind = "position", budget = {kept}}}'
        )
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: {names.count(name)} rungs are {name!r}; write one with their capacities added")


def _layers_of(key: str, num_layers: int) -> list[int]:
    """Layers that a key of ``layers`` names. Raises ``ConfigError`` if there are none."""
    if ":" in key:
        first, last = (int(part) if part else None for part in key.split(":"))
        found = list(range(num_layers))[slice(first, last)]
    else:
        index = int(key)
        found = [index % num_layers] if -num_layers <= index < num_layers else []
    if not found:
        raise ConfigError(f"layers {key!r} names no layer of this model, which has {num_layers}")
    return found


def _plain(model: BaseModel) -> dict[str, Any]:
    dumped = model.model_dump(mode="json")
    plain: dict[str, Any] = {}
    for name, described in type(model).model_fields.items():
        value = getattr(model, name)
        if value is not None or described.default is not None:
            plain[name] = _plain_value(value, dumped[name])
    return plain


def _plain_value(value: Any, dumped: Any) -> Any:
    if isinstance(value, BaseModel):
        return _plain(value)
    if isinstance(value, tuple):
        return [_plain_value(item, text) for item, text in zip(value, dumped, strict=True)]
    if isinstance(value, dict):
        return {key: _plain_value(item, dumped[key]) for key, item in value.items()}
    return dumped


__all__ = ["FadeConfig", "LayerOverride", "Rung", "TierConfig"]
