"""Every family's scheme against the embedding inside a tiny random model of that family (``-v`` prints the table)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from fade_rope import NoRope, scheme_from_config
from fade_rope.verification import relative_error

TOLERANCE = 1e-5
TRAINED, FAR = 64, 131_072

SHORT, LONG = [1.0 + 0.1 * i for i in range(8)], [2.0 + i for i in range(8)]
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": TRAINED // 2}
LONGROPE = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG, "factor": 4.0}
LONGROPE |= {"original_max_position_embeddings": TRAINED}
TWO_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 32}

TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": TRAINED,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WIDE = TEXT | {"head_dim": 24}  # not hidden_size / heads
ONE_KV = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
MOE = {"num_experts": 2, "num_local_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10_000.0, **parameters}}


def text_part(**rope_parameters: Any) -> dict[str, Any]:
    """The text model of a multimodal one."""
    return TEXT | {"head_dim": 16, "rope_parameters": {"rope_theta": 10_000.0, **rope_parameters}}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", TEXT),
    "Llama, own head width": ("llama", WIDE),
    "Llama linear": ("llama", TEXT | rope(rope_type="linear", factor=4.0)),
    "Llama dynamic": ("llama", TEXT | rope(rope_type="dynamic", factor=2.0)),
    "Llama yarn": ("llama", TEXT | rope(**YARN)),
    "Llama yarn, all options": (
        "llama",
        WIDE | rope(**YARN, beta_fast=20.0, beta_slow=2.0, mscale=1.2, mscale_all_dim=0.7, truncate=False),
    ),
    "Llama yarn, attention factor": ("llama", TEXT | rope(**YARN, attention_factor=1.5)),
    "Llama llama3": ("llama", TEXT | rope(**LLAMA3)),
    "Llama longrope": ("llama", TEXT | rope(**LONGROPE)),
    "Llama longrope, attention factor": ("llama", TEXT | rope(**LONGROPE, attention_factor=1.25)),
    "Mistral": ("mistral", TEXT),
    "Ministral 3 (yarn)": ("ministral3", TEXT | {"head_dim": 16}),
    "SmolLM3 (NoPE layers)": ("smollm3", TEXT | {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "Llama 4 (adjacent, NoPE layers)": (
        "llama4_text",
        TEXT | {"head_dim": 16, "num_hidden_layers": 4, "no_rope_layer_interval": 2} | MOE,
    ),
    "Phi (partial)": ("phi", TEXT | rope(partial_rotary_factor=0.5)),
    "Phi-3": ("phi3", TEXT),
    "Phi-3 longrope": ("phi3", TEXT | {"original_max_position_embeddings": TRAINED // 2} | rope(**LONGROPE)),
    "Phi-3 longrope, partial": (
        "phi3",
        TEXT | rope(**LONGROPE | {"short_factor": SHORT[:6], "long_factor": LONG[:6]}, partial_rotary_factor=0.75),
    ),
    "GPT-NeoX (partial)": ("gpt_neox", ONE_KV),
    "GPT-NeoX dynamic, partial": (
        "gpt_neox",
        ONE_KV | rope(rope_type="dynamic", factor=3.0, partial_rotary_factor=0.5),
    ),
    "GPT-J (adjacent, partial)": (
        "gptj",
        {"vocab_size": 100, "n_embd": 64, "n_head": 4, "n_layer": 2, "rotary_dim": 8, "n_positions": TRAINED},
    ),
    "StableLM (partial)": ("stablelm", TEXT),
    "Persimmon (partial)": ("persimmon", ONE_KV),
    "Nemotron (partial)": ("nemotron", TEXT | {"head_dim": 16}),
    "GLM (adjacent, partial)": ("glm", TEXT | {"head_dim": 16}),
    "GLM-4 (adjacent, partial)": ("glm4", TEXT | {"head_dim": 16}),
    "GLM-4 MoE (partial)": ("glm4_moe", TEXT | {"head_dim": 16, "n_routed_experts": 2} | MOE),
    "Cohere (adjacent)": ("cohere", TEXT),
    "Cohere 2 (adjacent, NoPE layers)": ("cohere2", TEXT | TWO_TYPES),
    "Helium (adjacent)": ("helium", TEXT | {"head_dim": 16}),
    "ERNIE 4.5 (adjacent)": ("ernie4_5", TEXT | {"head_dim": 16}),
    "NanoChat (reversed)": ("nanochat", TEXT | {"head_dim": 16}),
    "Gemma": ("gemma", WIDE),
    "Gemma 2": ("gemma2", WIDE | TWO_TYPES),
    "Gemma 3": ("gemma3_text", WIDE | TWO_TYPES),
    "Gemma 3 linear on full layers": (
        "gemma3_text",
        WIDE
        | TWO_TYPES
        | {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
    ),
    "Gemma 3n": (
        "gemma3n_text",
        WIDE
        | TWO_TYPES
        | {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 100}
        | {"laurel_rank": 4, "activation_sparsity_pattern": None},
    ),
    "Gemma 4 (proportional, wider full layers)": (
        "gemma4_text",
        WIDE | TWO_TYPES | {"global_head_dim": 40, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 100},
    ),
    "Qwen2": ("qwen2", TEXT),
    "Qwen3": ("qwen3", WIDE),
    "Qwen3 yarn": ("qwen3", WIDE | rope(**YARN)),
    "Qwen3-Next (partial)": (
        "qwen3_next",
        TEXT | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"]} | MOE,
    ),
    "Qwen3.5 text (mrope, partial)": (
        "qwen3_5_text",
        TEXT
        | {"head_dim": 32, "layer_types": ["linear_attention", "full_attention"]}
        | rope(partial_rotary_factor=0.5, mrope_section=[3, 3, 2]),
    ),
    "Qwen2-VL text (mrope)": ("qwen2_vl_text", text_part(rope_type="default", mrope_section=[2, 3, 3])),
    "Qwen2.5-VL text (mrope)": ("qwen2_5_vl_text", text_part(rope_type="default", mrope_section=[2, 3, 3])),
    "Qwen2.5-VL text (mrope, yarn)": ("qwen2_5_vl_text", text_part(**YARN, mrope_section=[2, 3, 3])),
    "Qwen3-VL text (mrope)": ("qwen3_vl_text", text_part(rope_type="default", mrope_section=[4, 2, 2])),
    "GLM-4V text (mrope, adjacent)": ("glm4v_text", text_part(rope_type="default", mrope_section=[2, 3, 3])),
    "Falcon": ("falcon", ONE_KV),
    "OLMo": ("olmo", TEXT),
    "OLMo 2": ("olmo2", TEXT),
    "OLMo 3": ("olmo3", TEXT | TWO_TYPES),
    "OLMo 3 yarn on full layers": (
        "olmo3",
        TEXT
        | TWO_TYPES
        | {
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            }
        },
    ),
    "OLMoE": ("olmoe", TEXT | MOE),
    "gpt-oss (yarn)": ("gpt_oss", TEXT | TWO_TYPES | {"head_dim": 16} | MOE),
    "EXAONE 4 (NoPE layers)": ("exaone4", TEXT | TWO_TYPES),
    "HunYuan (ntk)": ("hunyuan_v1_dense", WIDE | rope(rope_type="dynamic", alpha=1000.0, factor=1.0)),
    "Granite MoE hybrid": (
        "granitemoehybrid",
        TEXT
        | {"layer_types": ["mamba", "attention"], "position_embedding_type": "rope", "num_local_experts": 0}
        | {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_d_state": 8}
        | {"shared_intermediate_size": 64},
    ),
}

UNROTATED: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT-2 (learned)": ("gpt2", {"vocab_size": 100, "n_embd": 64, "n_head": 4, "n_layer": 2}),
    "OPT (learned)": ("opt", ONE_KV | {"ffn_dim": 64, "word_embed_proj_dim": 64}),
    "BLOOM (ALiBi)": ("bloom", {"vocab_size": 100, "hidden_size": 64, "n_head": 4, "n_layer": 2}),
    "MPT (ALiBi)": ("mpt", {"vocab_size": 100, "d_model": 64, "n_heads": 4, "n_layers": 2}),
    "Falcon (ALiBi)": ("falcon", ONE_KV | {"alibi": True}),
    "Jamba (none)": (
        "jamba",
        TEXT | {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False} | MOE,
    ),
}


def model_of(recipe: tuple[str, dict[str, Any]]) -> Any:
    kind, fields = recipe
    auto = transformers.AutoModel if "mrope_section" in fields.get("rope_parameters", {}) else AutoModelForCausalLM
    return auto.from_config(transformers.AutoConfig.for_model(kind, **fields)).eval()


def some_positions(limit: int) -> Tensor:
    """``[2, 9]``, different in each row, the largest possible one included."""
    positions = torch.stack([torch.randperm(limit - 1)[:9].sort().values for _ in range(2)])
    positions[1, -1] = limit - 1
    return positions


def reach(model: Any) -> int:
    """Positions below which a model works as its config says."""
    has_table = model.config.model_type == "gptj"
    # HunYuan before transformers 5.23 forgets its alpha beyond the trained length
    rotary = getattr(model.base_model, "rotary_emb", None)
    forgets = model.config.model_type == "hunyuan_v1_dense" and getattr(rotary, "rope_type", "") == "dynamic"
    return TRAINED if has_table or forgets else FAR


def whole_head(part: Tensor, head_dim: int) -> Tensor:
    """``part``, filled up with random channels where a model cuts the rotated ones out before it rotates."""
    return torch.cat([part, torch.randn(*part.shape[:-1], head_dim - part.shape[-1])], dim=-1)


def worst_error(model: Any, positions: Tensor, watch: Any) -> tuple[float, dict[int, Any]]:
    """Largest error over all queries and keys, and our scheme of every layer that the model rotated."""
    schemes, worst = {}, 0.0
    for rotation in watch(model, positions):
        scheme = scheme_from_config(model.config, rotation.layer)
        assert not isinstance(scheme, NoRope), f"layer {rotation.layer} rotates"
        assert relative_error(rotation.before, rotation.after) > 0.05, "this test would not see a missing rotation"
        width = rotation.before.shape[-1]
        whole = whole_head(rotation.before, scheme.spec.head_dim)
        found = scheme.rotate(whole, positions)
        assert torch.equal(found[..., width:], whole[..., width:])
        worst = max(worst, relative_error(found[..., :width], rotation.after))
        schemes[rotation.layer] = scheme
    return worst, schemes


@pytest.mark.parametrize("name", FAMILIES)
def test_rotates_as_the_model_does(name: str, seed: int, watch: Any, report: Any) -> None:
    model = model_of(FAMILIES[name])
    config = model.config.get_text_config()
    short, schemes = worst_error(model, some_positions(TRAINED), watch)
    far, _ = worst_error(model, some_positions(reach(model)), watch)
    assert schemes, "the model rotated nothing: this test compares nothing"
    report(name, ", ".join(sorted({s.kind for s in schemes.values()})), short, far)
    assert max(short, far) <= TOLERANCE
    for layer in range(config.num_hidden_layers):
        attends = getattr(config, "layer_types", None) is None or "attention" in config.layer_types[layer]
        if attends and "linear" not in (getattr(config, "layer_types", None) or [""] * 9)[layer]:
            assert isinstance(scheme_from_config(config, layer), NoRope) == (layer not in schemes)


@pytest.mark.parametrize("name", UNROTATED)
def test_rotates_nothing_where_the_model_does_not(name: str, seed: int, watch: Any) -> None:
    model = model_of(UNROTATED[name])
    assert watch(model, some_positions(TRAINED)) == []
    for layer in (None, 0, 1):
        scheme = scheme_from_config(model.config, layer)
        assert isinstance(scheme, NoRope)
        x = torch.randn(2, 2, 5, 16)
        assert scheme.rotate(x, torch.arange(5)) is x
        assert scheme.unrotate(x, torch.arange(5)) is x
        assert scheme.shift(x, torch.arange(5)) is x


@pytest.mark.parametrize("name", [n for n in FAMILIES if "VL text (mrope)" in n or "GLM-4V" in n])
def test_image_tokens_have_three_positions(name: str, seed: int, watch: Any) -> None:
    model = model_of(FAMILIES[name])
    axes = torch.stack([some_positions(FAR) for _ in range(3)])  # [3, B, T]
    scheme = scheme_from_config(model.config)
    rotations = watch(model, axes)
    assert rotations
    for rotation in rotations:
        found = scheme.rotate(rotation.before, axes[:, :, None])
        assert relative_error(found, rotation.after) <= TOLERANCE
        assert relative_error(scheme.unrotate(found, axes[:, :, None]), rotation.before) <= TOLERANCE
        moved = scheme.rotate(rotation.before, axes[:, :, None] % TRAINED + 7)
        start = scheme.rotate(rotation.before, axes[:, :, None] % TRAINED)
        assert relative_error(scheme.shift(start, 7), moved) <= TOLERANCE


def test_ntk_is_the_default_embedding_of_a_larger_base(seed: int, watch: Any) -> None:
    factor, width = 6.0, 16
    model = model_of(("llama", TEXT | rope(rope_theta=10_000.0 * factor ** (width / (width - 2)))))
    config = transformers.AutoConfig.for_model("llama", **TEXT)
    config.rope_parameters = {"rope_type": "ntk", "rope_theta": 10_000.0, "factor": factor}
    positions = some_positions(FAR)
    for rotation in watch(model, positions):
        found = scheme_from_config(config).rotate(rotation.before, positions)
        assert relative_error(found, rotation.after) <= TOLERANCE
