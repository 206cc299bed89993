"""What model families do that their configs do not say. Keys are ``model_type`` names of the text config."""

from __future__ import annotations

from typing import Any

ADJACENT_PAIRS = frozenset(
    {
        "blt_global_transformer",
        "blt_local_decoder",
        "blt_local_encoder",
        "blt_patcher",
        "codegen",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "ernie4_5",
        "ernie4_5_moe",
        "ernie4_5_vl_moe_text",
        "glm",
        "glm4",
        "glm4v_text",
        "glm_ocr_text",
        "gptj",
        "helium",
        "llama4_text",
        "moonshine",
        "moonshine_streaming",
        "openai_privacy_filter",
    }
)
"""Families that turn channels ``(2i, 2i + 1)``; all others turn ``(i, i + R/2)``."""

REVERSED = frozenset({"nanochat"})
"""Families that turn by minus the angle."""

SLIDING_LAYERS_ONLY = frozenset({"afmoe", "cohere2", "cohere2_moe", "flint"})
"""Families whose full-attention layers carry no positions."""

SLIDING_LAYERS_ONLY_IF_ANY = frozenset({"exaone4", "exaone_moe", "kolibri1"})
"""The same, but with ``sliding_window = None`` all layers rotate."""

SHARED_KEY_VALUE = frozenset({"deepseek_v4"})
"""Families that cache one vector a token which is key and value at once."""

INTERLEAVED_AXES = frozenset(
    {
        "cohere_compass_text",
        "cosmos3_edge_text",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_omni_moe_talker_text",
        "qwen3_omni_moe_text",
        "qwen3_vl_moe_text",
        "qwen3_vl_text",
        "qwen4_exp_text",
    }
)
"""Multimodal families that deal frequencies to time, height and width in turn (t h w t h w ...)."""

SECTIONED_AXES = frozenset(
    {
        "glm4v_moe_text",
        "glm4v_text",
        "glm_image_text",
        "glm_ocr_text",
        "paddleocr_vl_text",
        "qwen2_5_omni_talker",
        "qwen2_5_omni_text",
        "qwen2_5_vl_text",
        "qwen2_vl_text",
    }
)
"""Multimodal families that give each axis one run of frequencies (t t t h h h w w w)."""


def rotates(config: Any, layer_idx: int | None) -> bool:
    """Whether the keys of a layer (of the model at all, for ``None``) are rotated, as far as flags tell."""
    model_type = getattr(config, "model_type", "")
    if getattr(config, "alibi", False):
        return False
    if model_type == "granitemoehybrid" and getattr(config, "position_embedding_type", None) != "rope":
        return False
    if model_type == "zamba2" and not getattr(config, "use_mem_rope", False):
        return False
    if layer_idx is None:
        return True
    flags = getattr(config, "no_rope_layers", None)  # SmolLM3, Llama 4: 1 where the layer does rotate
    if flags:
        return bool(flags[layer_idx])
    windowed = model_type in SLIDING_LAYERS_ONLY or (
        model_type in SLIDING_LAYERS_ONLY_IF_ANY and getattr(config, "sliding_window", None) is not None
    )
    types = getattr(config, "layer_types", None)
    if not windowed or not types or types[layer_idx] == "sliding_attention":
        return True
    return (
        model_type == "cohere2_moe"
        and config.mlp_layer_types[layer_idx] == "dense"
        and config.prefix_dense_sliding_window_pattern == 1
    )


def axes(model_type: str, sections: list[int], pairs: int) -> tuple[int, ...]:
    """Which position axis each of ``pairs`` frequencies reads; empty for one position, or an unknown layout."""
    if not sections:
        return ()
    if model_type in SECTIONED_AXES:
        return tuple(i % 3 for i, width in enumerate(sections) for _ in range(width))
    if model_type in INTERLEAVED_AXES:
        return tuple(i % 3 if i < 3 * sections[i % 3] else 0 for i in range(pairs))
    return ()
