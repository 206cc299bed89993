"""The real model in every mode against the dense reference, and its text after half of the tokens are gone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from modes import MODES, Result, Task
from reference import DENSE, attention, dense_cache, stored
from tinymodels import left_padded
from torch import Tensor
from transformers import DynamicCache

from fade_core import FadeConfig, create_tiered_cache
from fade_eval.texts import demo_document, passages

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

SHORT = {"n_sink": 4, "recent_window": 16, "tile": 16}
SAFE = FadeConfig.safe().with_overrides(**SHORT)
"""The safe preset with a window short enough for prompts of a hundred tokens."""
EXACT = FadeConfig(**SHORT, ladder=[{"tier": "fp16"}])
MODES_HERE = sorted({*MODES} - {"assisted"})  # a second model of this size; early exit drafts with the same one


@pytest.fixture(scope="module")
def task(smollm2: tuple[Any, Any]) -> Task:
    model, tokenizer = smollm2
    text = tokenizer("\n\n".join(p.text for p in passages("evaluation")[:6]), return_tensors="pt").input_ids[0]

    def prompt(number: int, length: int, rows: int) -> Tensor:
        return torch.stack(
            [text[start : start + length] for start in range(97 * number, 97 * number + 300 * rows, 300)]
        )

    return Task(copy.deepcopy(model).double(), prompt, seed=7, new=16)


@pytest.fixture(scope="module")
def shallow(task: Task) -> Task:
    """The first four of the thirty layers: real weights, which is what matters here, in a seventh of the time."""
    model = copy.deepcopy(task.model)
    model.model.layers = model.model.layers[:4]
    model.config.num_hidden_layers = 4
    return replace(task, model=model, new=10)


def same(found: Result, wanted: Result) -> None:
    """Tokens identical, and the logits.

    In float64: a float32 difference of 1e-6 makes some code round the other way, that moves values by a whole step, and
    thirty layers on nothing is left to compare.
    """
    for ours, theirs in zip(found.tokens, wanted.tokens, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(found.logits, wanted.logits, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.std()))


@pytest.mark.parametrize("mode", MODES_HERE)
def test_safe_is_the_dense_reference(shallow: Task, mode: str) -> None:
    safe_is_the_dense_reference(shallow, mode)


def test_safe_is_the_dense_reference_through_all_layers(task: Task) -> None:
    safe_is_the_dense_reference(task, "padded_chat")


def safe_is_the_dense_reference(task: Task, mode: str) -> None:
    with create_tiered_cache(task.model, SAFE) as cache:
        found = MODES[mode](task, lambda padding: cache)
        assert all(int(layer.held.stores[0].lengths.min()) >= 16 for layer in cache.tiered)
    with attention(task.model, DENSE):
        wanted = MODES[mode](task, lambda padding: dense_cache(task.model, SAFE, padding))
    same(found, wanted)


@pytest.mark.parametrize("mode", ["padded_beam", "padded_chat", "prompt_lookup"])
def test_full_precision_ladder_is_the_dynamic_cache(shallow: Task, mode: str) -> None:
    task = shallow
    wanted = MODES[mode](task, lambda padding: DynamicCache(config=task.model.config))
    with create_tiered_cache(task.model, EXACT) as cache:
        same(MODES[mode](task, lambda padding: cache), wanted)


@pytest.mark.parametrize("policy", ["position", "h2o", "ema"])
def test_half_of_the_tokens_still_make_fluent_text(smollm2: tuple[Any, Any], policy: str) -> None:
    """Two questions of unlike length in one batch; the exact model finds the answers nearly as likely as its own."""
    model, tokenizer = smollm2
    document = demo_document()
    chats = [
        [{"role": "user", "content": f"{document.passage.text[:size]}\n\nWhat is this text about?"}]
        for size in (1200, 700)
    ]
    rows = [
        tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids[0]
        for chat in chats
    ]
    batch = left_padded(rows)
    own = model.generate(**batch, do_sample=False, max_new_tokens=32, min_new_tokens=32)
    config = FadeConfig(n_sink=4, recent_window=32, tile=16, policy={"kind": policy, "budget": 0.5, "every": 16})
    with create_tiered_cache(model, config) as cache:
        answers = model.generate(**batch, past_key_values=cache, do_sample=False, max_new_tokens=32, min_new_tokens=32)
        cache.rank()
        for layer in cache.tiered:
            kept = (stored(layer).tier >= 0).sum(-1)
            assert bool((kept <= (layer.held.lengths[:, None] // 2)).all())
    width = batch["input_ids"].shape[1]
    for row in range(2):
        print(policy, row, repr(tokenizer.decode(answers[row, width:])))
        surprise, ordinary = (nll(model, batch, tokens, row) for tokens in (answers, own))
        assert surprise <= ordinary + 1.5, "nats a token"
        assert len(set(answers[row, width:].tolist())) >= 12


@torch.no_grad()
def nll(model: Any, batch: dict[str, Tensor], tokens: Tensor, row: int) -> float:
    """Mean surprise of the exact model at what follows the prompt, in nats a token."""
    real = batch["attention_mask"][row].bool()
    width = len(real)
    ids = torch.cat([tokens[row, :width][real], tokens[row, width:]])[None]
    logits = model(ids, use_cache=False).logits[0, int(real.sum()) - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits, tokens[row, width:]))
