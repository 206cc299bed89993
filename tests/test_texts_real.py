"""The shipped texts against the real tokenizer and model: long enough, and answerable without compression."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StoppingCriteria

from fade_eval.texts import DemoDocument, Question, demo_document, passages

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


ANSWERED = "c7ab8e7394255c9854dddeb7c027b655"
"""Of all that decides the answers, as it was when every question was last answered."""


def digest(model: Any, asked: list[Any], demo: DemoDocument) -> str:
    """Of the tokens that are asked, the words that have to come, the model, and the versions of what runs it."""
    found = hashlib.sha256(f"{version('transformers')} {version('torch')}".encode())
    for inputs, question in zip(asked, demo.questions, strict=True):
        found.update(f"{inputs['input_ids'].tolist()} {question.expected}".encode())
    settings = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    found.update(repr(sorted(settings.items())).encode())
    for name, weight in model.state_dict().items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode() + weight.flatten()[::61].numpy().tobytes())
    return found.hexdigest()[:32]


@pytest.mark.slow
def test_the_model_answers_the_demo_questions_with_an_exact_cache(smollm2: tuple[Any, Any]) -> None:
    """Reading the document takes long: only once something has changed that the answers depend on, which no cache does."""
    model, tokenizer = smollm2
    demo = demo_document()
    assert len(tokenizer(demo.passage.text).input_ids) >= 3_000
    asked = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": demo.prompt(question)}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        for question in demo.questions
    ]
    if (now := digest(model, asked, demo)) == ANSWERED:
        return
    print(f"if the questions are answered: ANSWERED = {now!r}")
    cache, before = DynamicCache(config=model.config), None
    for question, inputs in zip(demo.questions, asked, strict=True):
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
