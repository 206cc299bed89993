"""Heads and channels of one layer, read off a model's configuration."""

from __future__ import annotations

from typing import Any


def layer_config(text: Any, index: int) -> Any:
    """The configuration of layer ``index``: transformers refuses to say of a whole model what differs between its layers."""
    layers = getattr(text, "per_layer_config", None)
    return layers[index] if layers is not None and index < len(layers) else text


def query_heads(text: Any, index: int) -> int:
    """Query heads of layer ``index``."""
    return int(layer_config(text, index).num_attention_heads)


def kv_heads(text: Any, index: int) -> int:
    """KV heads of layer ``index``; as many as query heads where the configuration names none."""
    return int(getattr(layer_config(text, index), "num_key_value_heads", None) or query_heads(text, index))


def head_channels(text: Any, index: int) -> int:
    """Channels of a head of layer ``index``."""
    found = getattr(layer_config(text, index), "head_dim", None) or getattr(text, "head_dim", None)
    return int(found or text.hidden_size // query_heads(text, index))
