"""From a model's config to the scheme of one of its layers."""

from __future__ import annotations

from typing import Any

from fade_core.errors import ConfigError
from fade_rope.default import DefaultRope
from fade_rope.dynamic import DynamicRope
from fade_rope.linear import LinearRope
from fade_rope.llama3 import Llama3Rope
from fade_rope.longrope import LongRope
from fade_rope.mrope import MRope
from fade_rope.none import NoRope
from fade_rope.ntk import NtkRope
from fade_rope.proportional import ProportionalRope
from fade_rope.reader import ALIASES, read_spec
from fade_rope.rotary import Rotary
from fade_rope.spec import RopeSpec
from fade_rope.yarn import YarnRope

FAMILIES: dict[str, type[Rotary]] = {
    family.kind: family
    for family in (
        DefaultRope,
        LinearRope,
        DynamicRope,
        NtkRope,
        YarnRope,
        Llama3Rope,
        LongRope,
        ProportionalRope,
    )
}
"""Names that a config's ``rope_type`` may have, to the class that rotates."""

Scheme = Rotary | MRope | NoRope
"""What a config may describe."""


def scheme_from_config(config: Any, layer_idx: int | None = None) -> Scheme:
    """The rotary embedding of one layer of a model, as its config describes it.

    Args:
        config: the model's transformers config, or one of a composite model that has a text part.
        layer_idx: the layer; negative counts from the end. Layers differ in Gemma 3 and 4 (own parameters a layer
            type) and in Cohere 2, SmolLM3, Llama 4 and EXAONE 4 (some layers do not rotate). ``None`` gives the
            embedding of the full-attention layers, which is that of all layers in most models.

    Returns:
        A scheme over ``[B, H, T, D]``; ``NoRope`` where keys carry no rotation.

    Raises:
        ConfigError: an unknown ``rope_type``, parameters that are missing or do not fit, a layer that does not exist.
        UnsupportedModelError: multi-head latent attention.
    """
    spec = read_spec(config, layer_idx)
    return NoRope() if spec is None else scheme_from_spec(spec)


def scheme_from_spec(spec: RopeSpec) -> Scheme:
    """The scheme that a spec describes. Raises ``ConfigError`` as ``scheme_from_config``."""
    if spec.kind not in FAMILIES:
        raise ConfigError(f"rope_type {spec.kind!r} is not known; known are {', '.join(sorted([*FAMILIES, *ALIASES]))}")
    rotary = FAMILIES[spec.kind](spec)
    return MRope(rotary, spec.axes) if spec.axes else rotary
