"""Models with random weights in the shapes of real ones: what a step costs does not depend on their values."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from fade_core.errors import InputError

if TYPE_CHECKING:
    import torch

_QWEN = {"model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    },
    "qwen2.5-7b": _QWEN | {
        "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 131_072,
    },
    "qwen2.5-0.5b": _QWEN | {
        "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "tie_word_embeddings": True,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32_768,
    },
    "gemma3-4b": {
        "model_type": "gemma3_text", "vocab_size": 262_208, "hidden_size": 2560, "intermediate_size": 10_240,
        "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "max_position_embeddings": 131_072, "sliding_window": 1024,
        "layer_types": ["full_attention" if layer % 6 == 5 else "sliding_attention" for layer in range(34)],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        },
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 256, "hidden_size": 256, "intermediate_size": 256,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 131_072,
    },
}  # fmt: skip
"""Fields of a model's configuration by its name; "tiny" is none that exists."""

ON_CPU = ("tiny",)
"""Those that a machine without a GPU runs too; they are in float32."""


def dtype_of(shape: str) -> torch.dtype:
    """float32 for what runs on a CPU, bfloat16 else."""
    import torch

    return torch.float32 if shape in ON_CPU else torch.bfloat16


def check_shape(shape: str, device: torch.device) -> None:
    """Raises ``InputError`` for another name than those of ``SHAPES``, or a shape that this device is no place for."""
    if shape not in SHAPES:
        raise InputError(f"unknown shape {shape!r}; there are {', '.join(SHAPES)}")
    if device.type != "cuda" and shape not in ON_CPU:
        count, dtype = weights(shape), dtype_of(shape)
        raise InputError(
            f"shape {shape} needs a GPU: its {count / 1e9:.1f} billion weights take {count * dtype.itemsize / 1e9:.1f} GB in "
            f"{str(dtype).removeprefix('torch.')}, without caches, and anything else would take minutes for what is timed in "
            f"milliseconds; found device {str(device)!r}. Without one, --shape {' or '.join(ON_CPU)} works"
        )


def weights(shape: str) -> int:
    """How many weights a model of this shape has. None is made."""
    import torch

    return sum(math.prod(parameter.shape) for parameter in _made(shape, torch.device("meta")).parameters())


def random_model(shape: str, device: torch.device, seed: int = 0) -> Any:
    """A causal language model of one of ``SHAPES`` with random weights, made on ``device``, in evaluation mode.

    Raises:
        InputError: as ``check_shape``.
    """
    import torch

    check_shape(shape, device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _made(shape, device).eval()


def _made(shape: str, device: torch.device) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[shape], eos_token_id=None, pad_token_id=0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype_of(shape))
