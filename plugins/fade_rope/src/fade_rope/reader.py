"""Reads a model's config, by attribute names alone, into a ``RopeSpec``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fade_core.errors import ConfigError, UnsupportedModelError
from fade_rope import facts
from fade_rope.spec import RopeSpec

ALIASES = {"su": "longrope", "mrope": "default", "xdrope": "dynamic"}
"""Older names of ``rope_type``."""

FULL = "full_attention"


def read_spec(model_config: Any, layer_idx: int | None = None) -> RopeSpec | None:
    """What ``model_config`` says of the rotary embedding of one layer.

    Args:
        model_config: a transformers config, of a text model or of one that contains a text model; only attributes
            are read, ``rope_parameters`` (or the older ``rope_scaling`` and ``rope_theta``) first.
        layer_idx: the layer; negative counts from the end. ``None`` means the model's embedding as its
            full-attention layers use it, whichever single layers leave it out.

    Returns:
        The numbers of the scheme, or ``None`` where keys are not rotated.

    Raises:
        ConfigError: a layer that does not exist, or a config that contradicts itself.
        UnsupportedModelError: multi-head latent attention, whose cached keys are not heads.
    """
    config = text_config(model_config)
    if layer_idx is not None:
        layer_idx = _existing_layer(config, layer_idx)
    latent = getattr(config, "kv_lora_rank", None) and getattr(config, "qk_rope_head_dim", None)
    if latent or getattr(config, "model_type", "") in facts.SHARED_KEY_VALUE:
        raise UnsupportedModelError(
            f"{_name(config)} caches latents (multi-head latent attention) instead of keys a head; no scheme of "
            f"fade-rope can move them, so leave its tokens where they are"
        )
    if not facts.rotates(config, layer_idx):
        return None
    layer_type = _layer_type(config, layer_idx)
    parameters = _parameters(config, layer_type)
    return None if parameters is None else _spec(config, layer_idx, layer_type, parameters)


def text_config(config: Any) -> Any:
    """The text part of a multimodal config, or ``config`` itself."""
    nested = getattr(config, "text_config", None)
    if nested is not None:
        return nested
    find = getattr(config, "get_text_config", None)
    return config if find is None else find(decoder=True)


def _name(config: Any) -> str:
    return f"model type {getattr(config, 'model_type', None) or type(config).__name__!r}"


def _existing_layer(config: Any, layer_idx: int) -> int:
    count = getattr(config, "num_hidden_layers", None)
    if count is None:
        return layer_idx
    if not -count <= layer_idx < count:
        raise ConfigError(f"layer_idx={layer_idx} does not exist: {_name(config)} has {count} layers")
    return layer_idx % int(count)


def _layer_type(config: Any, layer_idx: int | None) -> str:
    types = getattr(config, "layer_types", None)
    if not types:
        return FULL
    return types[layer_idx] if layer_idx is not None else FULL if FULL in types else types[0]


def _parameters(config: Any, layer_type: str) -> dict[str, Any] | None:
    """The layer's ``rope_parameters`` in today's spelling; ``None`` where the config gives it no rotary embedding."""
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"rope_parameters of {_name(config)} must be a dict; found {type(given).__name__}")
    by_type = [name for name, value in given.items() if isinstance(value, Mapping)]
    if by_type:
        if layer_type not in given:
            raise ConfigError(
                f"{_name(config)} has rope_parameters for {', '.join(sorted(by_type))}, none for {layer_type!r}"
            )
        if given[layer_type] is None:
            return None
        # transformers reads yarn's `truncate` beside the layer types, never among their parameters
        return {**given[layer_type], "truncate": given.get("truncate", True)}
    if not given and all(getattr(config, name, None) is None for name in ("rope_theta", "rotary_dim")):
        return None
    parameters = dict(given)
    outside = getattr(config, "original_max_position_embeddings", None)
    if outside is not None:
        parameters["original_max_position_embeddings"] = outside
    return parameters


def _spec(config: Any, layer_idx: int | None, layer_type: str, parameters: dict[str, Any]) -> RopeSpec:
    model_type = getattr(config, "model_type", "")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    kind = ALIASES.get(kind, kind)
    if kind == "longrope" and "long_mscale" in parameters:
        raise ConfigError(
            f"{_name(config)} scales keys by {parameters['long_mscale']!r} on long inputs but turns them by its short "
            f"factors (PhiMoE); no scheme of fade-rope does that"
        )
    if kind == "dynamic" and parameters.get("alpha"):  # HunYuan
        kind, parameters["factor"] = "ntk", parameters["alpha"]
    head_dim = _head_dim(config, layer_idx, layer_type)
    share = parameters.get("partial_rotary_factor")
    if share is None:
        share = getattr(config, "partial_rotary_factor", None)
    if kind == "proportional":
        share = None
    rotary_dim = head_dim if share is None else int(head_dim * share)
    if not parameters:  # GPT-J and CodeGen say it outright
        rotary_dim = getattr(config, "rotary_dim", None) or rotary_dim
    theta = parameters.get("rope_theta") or getattr(config, "rope_theta", None)
    return RopeSpec(
        kind=kind,
        theta=float(theta or getattr(config, "default_theta", None) or 10_000.0),
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        pairing="adjacent" if model_type in facts.ADJACENT_PAIRS else "half",
        max_length=getattr(config, "max_position_embeddings", None),
        reversed=model_type in facts.REVERSED,
        axes=facts.axes(model_type, parameters.get("mrope_section") or [], rotary_dim // 2),
        parameters=parameters,
    )


def _head_dim(config: Any, layer_idx: int | None, layer_type: str) -> int:
    if getattr(config, "is_heterogeneous", False):
        config = config.per_layer_config[layer_type if layer_idx is None else layer_idx]
    elif layer_type == FULL and getattr(config, "global_head_dim", None):
        return int(config.global_head_dim)
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
        if not width or not heads:
            raise ConfigError(
                f"{_name(config)} gives neither head_dim nor hidden_size and num_attention_heads; RoPE needs the width "
                f"of a head"
            )
        head_dim = width // heads
    return int(head_dim)
