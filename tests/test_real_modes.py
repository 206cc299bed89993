"""The real model in every mode against the dense reference, and its text after half of the tokens are gone."""

from __future__ import annotations

import copy
from dataclasses import dataclass
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
WORDS = 8192
"""Tokens that may be said, the commonest ones: reading the whole table takes longer than the layers here."""
MODES_HERE = sorted({*MODES} - {"assisted"})  # a second model of this size; early exit drafts with the same one


def task_of(smollm2: tuple[Any, Any], layers: int) -> Task:
    """Real text, half as long as the modes ask: three tiles a row instead of six."""
    whole, tokenizer = smollm2
    text = tokenizer("\n\n".join(p.text for p in passages("evaluation")[:6]), return_tensors="pt").input_ids[0]
    text = text[text < WORDS]
    copied: dict[int, Any] = {}
    copied[id(whole.model.layers)] = copy.deepcopy(whole.model.layers[:layers], copied)
    head = torch.nn.Linear(*reversed(whole.lm_head.weight[:WORDS].shape), bias=False)
    head.weight.data = whole.lm_head.weight.data[:WORDS].clone()
    copied[id(whole.lm_head)] = head
    model = copy.deepcopy(whole, copied).double()
    model.config.num_hidden_layers, model.config.vocab_size = layers, WORDS

    def prompt(number: int, length: int, rows: int) -> Tensor:
        taken = (length + 1) // 2
        return torch.stack([text[start : start + taken] for start in range(97 * number, 97 * number + 300 * rows, 300)])

    return Task(model, prompt, seed=7, new=8)


@pytest.fixture(scope="module")
def shallow(smollm2: tuple[Any, Any]) -> Task:
    """The first two of the thirty layers: real weights, which is what matters here, in a fraction of the time."""
    return task_of(smollm2, 2)


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


def test_safe_is_the_dense_reference_through_all_layers(smollm2: tuple[Any, Any]) -> None:
    """One row: what rows and turns do to one another is the same in two layers."""
    safe_is_the_dense_reference(task_of(smollm2, 30), "greedy")


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


@dataclass(frozen=True)
class Asked:
    """Two questions of unlike length in one batch, and the exact model after it has read them.

    Attributes:
        batch: the questions, padded on the left.
        past: their keys and values.
        first: logits after them.
        ordinary: how surprising the exact model finds its own answers, nats a token and row.
    """

    batch: dict[str, Tensor]
    past: DynamicCache
    first: Tensor
    ordinary: Tensor


SAID = 16
"""Tokens of an answer: tokens of it are ranked after every eighth."""


@pytest.fixture(scope="module")
def asked(smollm2: tuple[Any, Any]) -> Asked:
    model, tokenizer = smollm2
    document = demo_document()
    chats = [
        [{"role": "user", "content": f"{document.passage.text[:size]}\n\nWhat is this text about?"}]
        for size in (600, 350)
    ]
    rows = [
        tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids[0]
        for chat in chats
    ]
    batch = left_padded(rows)
    past, width = DynamicCache(config=model.config), batch["input_ids"].shape[1]
    own = model.generate(
        **batch,
        past_key_values=past,
        do_sample=False,
        max_new_tokens=SAID,
        min_new_tokens=SAID,
        return_dict_in_generate=True,
        output_logits=True,
    )
    past.crop(width - past.get_seq_length())
    return Asked(batch, past, own.logits[0], nll(torch.stack(own.logits, 1), own.sequences[:, width:]))


@pytest.mark.parametrize("policy", ["position", "h2o"])
def test_half_of_the_tokens_still_make_fluent_text(smollm2: tuple[Any, Any], asked: Asked, policy: str) -> None:
    """The exact model finds the answers nearly as likely as its own."""
    (model, tokenizer), batch = smollm2, asked.batch
    config = FadeConfig(n_sink=4, recent_window=32, tile=16, policy={"kind": policy, "budget": 0.5, "every": 8})
    with create_tiered_cache(model, config) as cache:
        answers = model.generate(
            **batch, past_key_values=cache, do_sample=False, max_new_tokens=SAID, min_new_tokens=SAID
        )
        cache.rank()
        for layer in cache.tiered:
            kept = (stored(layer).tier >= 0).sum(-1)
            assert bool((kept <= (layer.held.lengths[:, None] // 2)).all())
    said = answers[:, batch["input_ids"].shape[1] :]
    surprise = nll(exact_logits(model, asked, said), said)
    for row in range(2):
        print(policy, row, repr(tokenizer.decode(said[row])))
        assert surprise[row] <= asked.ordinary[row] + 1.5, "nats a token"
        assert len(set(said[row].tolist())) >= 7


@torch.no_grad()
def exact_logits(model: Any, asked: Asked, said: Tensor) -> Tensor:
    """What the exact model expects at each of the tokens ``said`` after the questions."""
    mask = torch.cat([asked.batch["attention_mask"], torch.ones_like(said[:, 1:])], 1)
    places = (mask.cumsum(-1) - 1)[:, 1 - said.shape[1] :]
    past = copy.deepcopy(asked.past)
    out = model(said[:, :-1], attention_mask=mask, position_ids=places, past_key_values=past, use_cache=True)
    return torch.cat([asked.first[:, None], out.logits], 1)


def nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean surprise at ``tokens``, nats a token and row."""
    return torch.nn.functional.cross_entropy(logits.mT, tokens, reduction="none").mean(-1)
