"""The shipped texts against the real tokenizer and model: long enough, and answerable without compression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria

from fade_eval.texts import Question, demo_document, passages

pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def tokenizer(smollm2: tuple[Any, Any]) -> Any:
    return smollm2[1]


@pytest.mark.parametrize(("split", "tokens"), [("evaluation", 1_500), ("calibration", 1_050), ("unlike", 1_450)])
def test_passages_are_long_enough(tokenizer: Any, split: Any, tokens: int) -> None:
    lengths = {p.name: len(tokenizer(p.text).input_ids) for p in passages(split)}
    assert min(lengths.values()) >= tokens, lengths


class Answered(StoppingCriteria):
    """Stops as soon as what was said answers the question: more would not change that."""

    def __init__(self, tokenizer: Any, question: Question, prompt_tokens: int) -> None:
        self.tokenizer, self.question, self.prompt_tokens = tokenizer, question, prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        said = self.tokenizer.decode(input_ids[0, self.prompt_tokens :], skip_special_tokens=True)
        return torch.tensor([self.question.answered_by(said)])


@pytest.mark.slow
def test_the_model_answers_the_demo_questions_with_an_exact_cache(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    demo = demo_document()
    assert len(tokenizer(demo.passage.text).input_ids) >= 3_000
    cache, before = DynamicCache(config=model.config), None
    for question in demo.questions:
        chat = [{"role": "user", "content": demo.prompt(question)}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        ids = inputs["input_ids"][0]
        if before is not None:  # the document, which all questions follow, is read once
            width = min(len(ids), len(before))
            alike = int((ids[:width] == before[:width]).int().cumprod(0).sum())
            assert alike >= 3_000
            cache.crop(alike - cache.get_seq_length())
        before = ids
        output = model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            stopping_criteria=[Answered(tokenizer, question, len(ids))],
        )
        answer = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        assert question.answered_by(answer), f"{question.text} -> {answer!r}"
