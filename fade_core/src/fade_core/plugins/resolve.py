"""Fields and factories that turn ``{kind = "h2o", budget = 0.5}`` into the object of whatever plugin provides it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_args

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, SerializationInfo, TypeAdapter
from pydantic_core import CoreSchema, core_schema

from fade_core.errors import ConfigError, PluginError
from fade_core.interfaces import (
    ComponentConfig,
    EvictionPolicy,
    PolicyConfig,
    Quantizer,
    QuantizerConfig,
    QuantizerContext,
    RopeConfig,
    Side,
    TelemetrySinkConfig,
    TierConfig,
)
from fade_core.plugins.registry import Group, default_registry
from fade_core.support.validation import not_provided, shown

_describing: set[Group] = set()
"""Groups whose JSON Schema is being made."""


@dataclass(frozen=True)
class Installed:
    """Annotation of a field that holds a component of ``group``, looked up in the registry when it is validated.

    A mapping is resolved by its discriminator; an object that is already a configuration is taken as it is.
    """

    group: Group
    discriminator: str = "kind"

    def __get_pydantic_core_schema__(self, source: type[ComponentConfig], handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: Any) -> ComponentConfig:
            if isinstance(value, source):
                return value
            component: ComponentConfig = resolve(self.group, value, self.discriminator)
            return component

        return core_schema.no_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        if self.group in _describing:  # a component of its own group, as a policy around a policy
            return {
                "type": "object",
                "properties": {self.discriminator: {"enum": sorted(default_registry().all(self.group))}},
                "required": [self.discriminator],
            }
        choices = {name: TypeAdapter(config).core_schema for name, config in default_registry().all(self.group).items()}
        if not choices:
            return {"not": {}, "description": f"no plugin that is installed provides {self.group}"}
        _describing.add(self.group)
        try:
            return handler(core_schema.tagged_union_schema(choices, self.discriminator))
        finally:
            _describing.discard(self.group)


AnyQuantizer = Annotated[QuantizerConfig, Installed("quantizers")]
AnyPolicy = Annotated[PolicyConfig, Installed("policies")]
AnyRope = Annotated[RopeConfig, Installed("rope_schemes")]
AnyTier = Annotated[TierConfig, Installed("tiers", "tier")]
AnySink = Annotated[TelemetrySinkConfig, Installed("telemetry_sinks")]


def resolve(group: Group, value: Any, discriminator: str = "kind") -> Any:
    """The component's configuration that a mapping such as ``{"kind": "h2o", "budget": 0.5}`` describes.

    Raises:
        ConfigError: for something that is not a mapping, has no discriminator, or does not fit the component.
        UnknownComponentError: for a name that nothing installed provides.
        PluginError: for a name that two plugins provide.
    """
    known = ", ".join(default_registry().names(group)) or "none"
    if not isinstance(value, Mapping):
        raise ConfigError(f"a table with {discriminator!r} is needed (one of {known}); found {shown(value)}")
    name = value.get(discriminator)
    if not isinstance(name, str):
        raise ConfigError(f"needs {discriminator!r}, one of {known}; found {shown(dict(value))}")
    try:
        component = default_registry().get(group, name)
    except PluginError as error:
        raise not_provided(error) from None
    return component.model_validate(dict(value))


def get_quantizer(kind: str, *, head_dim: int, **options: Any) -> Quantizer:
    """Build a quantizer by name: ``get_quantizer("uniform", head_dim=64, bits=2, side="value")``.

    Args:
        kind: name of an installed quantizer.
        head_dim: channels ``D`` of a head.
        options: fields of ``QuantizerContext`` (side, tile, layer, num_layers, num_kv_heads, device) and of the
            quantizer's own configuration.

    Raises:
        UnknownComponentError: if nothing installed provides ``kind``.
        ConfigError: if an option is unknown or does not fit.
    """
    if type(head_dim) is not int or head_dim < 1:
        raise ConfigError(f"head_dim={head_dim!r} must be a positive whole number")
    if options.get("side", "key") not in get_args(Side):
        raise ConfigError(f"side={options['side']!r} must be 'key' or 'value'")
    places = {f.name for f in dataclasses.fields(QuantizerContext)}
    context = QuantizerContext(head_dim, **{name: value for name, value in options.items() if name in places})
    fields = {name: value for name, value in options.items() if name not in places}
    config: QuantizerConfig = resolve("quantizers", {"kind": kind, **fields})
    return config.build(context)


def get_policy(kind: str, **options: Any) -> EvictionPolicy:
    """Build an eviction policy by name: ``get_policy("ema", decay=0.95)``.

    Raises:
        UnknownComponentError: if nothing installed provides ``kind``.
        ConfigError: if an option is unknown or does not fit.
    """
    config: PolicyConfig = resolve("policies", {"kind": kind, **options})
    return config.build()


def _dump(value: ComponentConfig, info: SerializationInfo) -> dict[str, Any]:
    return value.model_dump(
        mode=info.mode,
        exclude_none=info.exclude_none,
        exclude_unset=info.exclude_unset,
        exclude_defaults=info.exclude_defaults,
    )
