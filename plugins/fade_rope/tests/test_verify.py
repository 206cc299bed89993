"""The check of a model against itself: it accepts what is right, sees what is wrong, and leaves the model alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import fade_rope.verification
from fade_core.errors import InputError
from fade_rope import NoRope, verify

TINY = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


def tiny(kind: str, **fields: Any) -> Any:
    config = transformers.AutoConfig.for_model(kind, **TINY | fields)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["llama", "glm", "cohere2", "gemma3_text", "smollm3", "qwen3"])
def test_right_schemes_pass_on_every_layer(kind: str, seed: int) -> None:
    head = {} if kind == "smollm3" else {"head_dim": 16}
    errors = verify(tiny(kind, **head))
    assert sorted(errors) == [0, 1, 2]
    assert max(errors.values()) <= 1e-5


def test_half_precision_shows_its_own_rounding_only(seed: int) -> None:
    errors = verify(tiny("llama").to(torch.bfloat16), positions=range(8))
    assert max(errors.values()) <= 2**-7


def test_a_wrong_scheme_is_seen(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    monkeypatch.setattr(fade_rope.verification, "scheme_from_config", lambda config, layer: NoRope())
    assert min(verify(model).values()) > 0.1


def test_wrong_pairs_are_seen(seed: int) -> None:
    model = tiny("llama")
    model.config.model_type = "glm"  # says adjacent; the model turns halves
    assert min(verify(model).values()) > 0.1


def test_the_model_is_as_before(seed: int) -> None:
    model = tiny("llama")
    tokens = torch.randint(0, 100, (1, 9))
    with torch.no_grad():
        before = model(tokens).logits
        verify(model)
        after = model(tokens).logits
    assert torch.equal(before, after)
    assert not any(m._forward_hooks for m in model.modules())


def test_a_model_without_keys_is_named(seed: int) -> None:
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, state_size=8)
    ).eval()
    with pytest.raises(InputError, match="MambaForCausalLM returns no past_key_values"):
        verify(model)
