"""Configurations of the schemes: what ``kind = ...`` in a FADE config means."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from fade_core.errors import ConfigError
from fade_core.interfaces import RopeConfig, RopeScheme
from fade_rope.none import NoRope
from fade_rope.reader import read_spec
from fade_rope.schemes import scheme_from_config, scheme_from_spec
from fade_rope.spec import RopeSpec

Positive = Annotated[float, Field(strict=True, gt=0)]
Tokens = Annotated[int, Field(strict=True, ge=1)]
Factors = Annotated[tuple[Positive, ...], Field(min_length=1)]


class AutoRopeConfig(RopeConfig):
    """Whatever the model's config says: the choice unless that is wrong."""

    kind: Literal["auto"] = "auto"

    def build(self, model_config: Any, layer_idx: int | None = None) -> RopeScheme:
        """As ``scheme_from_config``."""
        return scheme_from_config(model_config, layer_idx)


class NoRopeConfig(RopeConfig):
    """No rotation. Refused for a layer whose keys are rotated according to the model's config."""

    kind: Literal["none"] = "none"

    def build(self, model_config: Any, layer_idx: int | None = None) -> RopeScheme:
        """Raises ``ConfigError`` if the model's config names a rotary embedding."""
        spec = read_spec(model_config, layer_idx)
        if spec is not None:
            raise ConfigError(f"kind='none' contradicts the model's config, which names RoPE {spec.kind!r}")
        return NoRope()


class SchemeConfig(RopeConfig):
    """A named scheme, which must be the one that the model's config names.

    Fields that are given replace what the model's config says; fields left out are read from it.

    Attributes:
        rope_theta: base of the frequencies.
    """

    rope_theta: Positive | None = None

    def build(self, model_config: Any, layer_idx: int | None = None) -> RopeScheme:
        """The scheme of one layer.

        Raises:
            ConfigError: the model's config names another scheme or none, or a number is missing.
        """
        spec = read_spec(model_config, layer_idx)
        if spec is None or not self.describes(spec):
            named = "no rotary embedding" if spec is None else f"RoPE {spec.kind!r}"
            raise ConfigError(
                f"kind={self.kind!r} contradicts the model's config, which names {named}; try kind='auto'"
            )
        given = self.model_dump(exclude={"kind"}, exclude_none=True)
        theta = given.pop("rope_theta", spec.theta)
        return scheme_from_spec(replace(spec, theta=theta, parameters={**spec.parameters, **given}))

    def describes(self, spec: RopeSpec) -> bool:
        """Whether the model's config means this scheme."""
        return spec.kind == self.kind


class DefaultRopeConfig(SchemeConfig):
    """Plain rotary embedding, whole or partial."""

    kind: Literal["default"] = "default"


class LinearRopeConfig(SchemeConfig):
    """Position interpolation.

    Attributes:
        factor: new context length over trained context length.
    """

    kind: Literal["linear"] = "linear"
    factor: Positive | None = None


class NtkRopeConfig(SchemeConfig):
    """NTK-aware scaling of the base by a fixed factor.

    Attributes:
        factor: how far the slowest pair is stretched.
    """

    kind: Literal["ntk"] = "ntk"
    factor: Positive | None = None


class DynamicRopeConfig(SchemeConfig):
    """NTK-aware scaling that grows with the length.

    Attributes:
        factor: how fast the base grows past the trained length.
    """

    kind: Literal["dynamic"] = "dynamic"
    factor: Positive | None = None


class YarnRopeConfig(SchemeConfig):
    """YaRN.

    Attributes:
        factor: new context length over trained context length.
        original_max_position_embeddings: trained context length, tokens.
        attention_factor: factor on keys and queries; by default from ``factor``.
        beta_fast: pairs that turn at least as often within the trained length are left alone.
        beta_slow: pairs that turn at most as often are interpolated by ``factor``.
        mscale: numerator's weight of the attention factor; counts only with ``mscale_all_dim``.
        mscale_all_dim: denominator's weight.
        truncate: whether the two bounds are rounded outwards to whole pairs.
    """

    kind: Literal["yarn"] = "yarn"
    factor: Positive | None = None
    original_max_position_embeddings: Tokens | None = None
    attention_factor: Positive | None = None
    beta_fast: Positive | None = None
    beta_slow: Positive | None = None
    mscale: Positive | None = None
    mscale_all_dim: Positive | None = None
    truncate: bool | None = None


class Llama3RopeConfig(SchemeConfig):
    """Llama 3.1's scaling.

    Attributes:
        factor: how much long wavelengths are stretched.
        original_max_position_embeddings: trained context length, tokens.
        low_freq_factor: wavelengths above the trained length over this are stretched fully.
        high_freq_factor: wavelengths below the trained length over this are kept.
    """

    kind: Literal["llama3"] = "llama3"
    factor: Positive | None = None
    original_max_position_embeddings: Tokens | None = None
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None


class LongRopeConfig(SchemeConfig):
    """LongRoPE.

    Attributes:
        short_factor: a divisor a pair, up to the trained length.
        long_factor: a divisor a pair, beyond it.
        original_max_position_embeddings: trained context length, tokens.
        factor: new over trained length; sets the attention factor.
        attention_factor: factor on keys and queries; by default from ``factor``.
    """

    kind: Literal["longrope"] = "longrope"
    short_factor: Factors | None = None
    long_factor: Factors | None = None
    original_max_position_embeddings: Tokens | None = None
    factor: Positive | None = None
    attention_factor: Positive | None = None


class ProportionalRopeConfig(SchemeConfig):
    """Partial rotation over the whole head.

    Attributes:
        factor: divisor of all frequencies.
        partial_rotary_factor: share of the pairs that turn.
    """

    kind: Literal["proportional"] = "proportional"
    factor: Positive | None = None
    partial_rotary_factor: Positive | None = None


class MRopeConfig(SchemeConfig):
    """Multimodal RoPE, over whatever scaling the model's config names."""

    kind: Literal["mrope"] = "mrope"

    def describes(self, spec: RopeSpec) -> bool:
        return bool(spec.axes)
