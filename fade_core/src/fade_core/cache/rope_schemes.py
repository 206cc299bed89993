"""The rotary embedding of each layer of a model: for ``reposition = "contiguous"``, and for quantizers that learn."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fade_core.errors import ConfigError, UnknownComponentError, UnsupportedModelError
from fade_core.interfaces import RopeConfig, RopeScheme
from fade_core.plugins import default_registry

AUTO = "auto"
"""Name of the scheme that reads the model's config; a plugin provides it."""

_LEARNED = frozenset({"wpe", "embed_positions", "position_embeddings", "position_embedding", "pos_encoding", "pos_emb"})
"""What models call the positions that they add to their embeddings."""

_KEEP = 'use reposition = "keep"'


def layer_schemes(
    rope: RopeConfig | None, model: Any, layers: Iterable[int], max_length: int | None
) -> dict[int, RopeScheme | None]:
    """The scheme that moves the keys of each layer; ``None`` for a layer whose keys carry no position.

    Args:
        rope: what the configuration says of the scheme; ``None`` to read it off the model's config.
        model: the model.
        layers: indices of the layers that are compressed.
        max_length: most tokens that the cache may see.

    Raises:
        ConfigError: no plugin provides a scheme, the scheme does not fit the model, or its frequencies change before
            ``max_length``.
        UnsupportedModelError: a model whose positions are not in its keys, or that counts them in another way.
    """
    config = model.config.get_text_config(decoder=True)
    name = type(model).__name__
    chosen = _detecting() if rope is None else rope
    _refuse_bias(config, name)
    schemes: dict[int, RopeScheme | None] = {}
    for index in layers:
        try:
            scheme = chosen.build(config, index)
        except (ConfigError, UnsupportedModelError) as error:
            raise type(error)(f'reposition = "contiguous" does not work on {name}, layer {index}: {error}') from error
        _refuse_growth(scheme, name, index, max_length)
        if scheme.kind == "mrope" and config is not model.config:
            raise UnsupportedModelError(
                f"{name} gives the tokens of an image positions of their own (mrope), so that holes cannot be counted in "
                f"tokens; {_KEEP}"
            )
        schemes[index] = None if scheme.kind == "none" else scheme
    if not any(schemes.values()):
        _refuse_learned(model, name)
    return schemes


def known_scheme(rope: RopeConfig | None, config: Any, layer: int) -> RopeScheme | None:
    """How the keys of a layer carry their positions, as quantizers that learn are told; ``None`` if nobody here knows.

    Args:
        rope: as for ``layer_schemes``.
        config: the text part of a model's configuration.
        layer: layer index.
    """
    try:
        scheme = (_detecting() if rope is None else rope).build(config, layer)
    except (ConfigError, UnsupportedModelError):
        return None
    return scheme if scheme.fixed_until is None else None


def rope_scheme_of(model: Any, layer: int = 0) -> RopeScheme | None:
    """How the keys of a layer of ``model`` carry their positions; ``None`` where no plugin knows, or frequencies change.

    Args:
        model: a transformers model.
        layer: layer index.
    """
    return known_scheme(None, model.config.get_text_config(decoder=True), layer)


def _detecting() -> RopeConfig:
    try:
        found: RopeConfig = default_registry().get("rope_schemes", AUTO)()
    except UnknownComponentError as error:
        raise ConfigError(
            'reposition = "contiguous" moves keys with the model\'s rotary embedding, which a plugin has to provide: '
            f"pip install fade-rope ({error})"
        ) from error
    return found


def _refuse_bias(config: Any, name: str) -> None:
    if getattr(config, "alibi", False) or getattr(config, "model_type", "") in ("bloom", "mpt"):
        raise UnsupportedModelError(
            f"{name} has its positions in a bias on the scores (ALiBi), not in its keys; they cannot be moved. {_KEEP}"
        )


def _refuse_growth(scheme: RopeScheme, name: str, index: int, max_length: int | None) -> None:
    limit = scheme.fixed_until
    if limit is not None and (max_length is None or max_length > limit):
        raise ConfigError(
            f"layer {index} of {name}: RoPE {scheme.kind!r} changes its frequencies once more than {limit} tokens were seen, "
            "so that queries after it and keys before it no longer differ by a distance; create the cache with "
            f"max_cache_len={limit} or less, or {_KEEP}"
        )


def _refuse_learned(model: Any, name: str) -> None:
    for path, _ in model.named_modules():
        if path.rpartition(".")[2] in _LEARNED:
            raise UnsupportedModelError(
                f"{name} adds positions to its embeddings ({path}), so that they are in every key and value for good; {_KEEP}"
            )
