"""Every way to generate that a cache has to survive, as functions of a model and something that makes its cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tinymodels import left_padded, prompt
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.cache_utils import Cache

MakeCache = Callable[[Tensor | None], Cache]
"""A fresh cache, given the padding of each row (int64 ``[B]``) or ``None``."""


@dataclass(frozen=True)
class Result:
    """What a mode gave: token ids, the logits they came from where the mode tells them, and the cache."""

    tokens: list[Tensor]
    logits: list[Tensor]
    cache: Cache


@dataclass(frozen=True)
class Task:
    """What a mode generates from.

    Attributes:
        model: the model, running whichever attention the cache needs.
        prompt: token ids ``[rows, length]`` for a number of its own, a length and rows.
        seed: of everything random.
        new: tokens to generate (a mode of several turns divides them). Prompts are as long as lets the nine of a tiny
            model fill a tile of 16; modes that take tokens back make twice as many.
    """

    model: PreTrainedModel
    prompt: Callable[[int, int, int], Tensor]
    seed: int
    new: int = 9


Mode = Callable[[Task, MakeCache], Result]


def tiny_task(model: PreTrainedModel, seed: int) -> Task:
    """Random tokens for a tiny model."""
    return Task(model, lambda number, length, rows: prompt(seed + number, length, rows), seed)


def _generate(task: Task, cache: Cache, inputs: dict[str, Tensor], **options: Any) -> Result:
    """One call of ``generate``, greedy unless told otherwise, that never ends early."""
    new = options.pop("new", task.new)
    ids = inputs["input_ids"]
    settings: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "do_sample": False} | inputs | options
    out = task.model.generate(
        **settings,
        past_key_values=cache,
        max_new_tokens=new,
        min_new_tokens=new,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return Result([out.sequences], list(out.logits), cache)


def _longer(task: Task, cache: Cache, inputs: dict[str, Tensor], **options: Any) -> Result:
    return _generate(task, cache, inputs, new=task.new * 2, **options)


def _rows(task: Task) -> tuple[dict[str, Tensor], Tensor]:
    inputs = left_padded([task.prompt(i, length, 1)[0] for i, length in enumerate((141, 92, 173))])
    return inputs, (inputs["attention_mask"] == 0).sum(-1)


def greedy(task: Task, make: MakeCache) -> Result:
    return _generate(task, make(None), {"input_ids": task.prompt(0, 157, 1)})


def sampling(task: Task, make: MakeCache) -> Result:
    torch.manual_seed(task.seed)
    return _generate(task, make(None), {"input_ids": task.prompt(0, 126, 2)}, do_sample=True, top_k=20)


def beam(task: Task, make: MakeCache) -> Result:
    return _generate(task, make(None), {"input_ids": task.prompt(0, 110, 1)}, num_beams=4)


def padded_beam(task: Task, make: MakeCache) -> Result:
    inputs, padding = _rows(task)
    return _generate(task, make(padding), inputs, num_beams=3)


def prompt_lookup(task: Task, make: MakeCache) -> Result:
    return _longer(task, make(None), {"input_ids": task.prompt(0, 160, 1)}, prompt_lookup_num_tokens=5)


def assisted(task: Task, make: MakeCache) -> Result:
    return _longer(task, make(None), {"input_ids": task.prompt(0, 111, 1)}, assistant_model=_assistant(task))


def early_exit(task: Task, make: MakeCache) -> Result:
    """Assisted by the model's own first layers, which run the same attention over a cache of their own."""
    layers = task.model.config.get_text_config().num_hidden_layers
    return _longer(task, make(None), {"input_ids": task.prompt(0, 130, 1)}, assistant_early_exit=(layers + 1) // 2)


def padded(task: Task, make: MakeCache) -> Result:
    inputs, padding = _rows(task)
    return _generate(task, make(padding), inputs)


def chunked(task: Task, make: MakeCache) -> Result:
    return _generate(task, make(None), {"input_ids": task.prompt(0, 173, 1)}, prefill_chunk_size=37)


def padded_chunked(task: Task, make: MakeCache) -> Result:
    """The second row's padding is longer than two chunks."""
    inputs, padding = _rows(task)
    return _generate(task, make(padding), inputs, prefill_chunk_size=40)


def chat(task: Task, make: MakeCache) -> Result:
    """Three turns: the second adds a long message, the third a short one."""
    cache = make(None)
    said = task.prompt(0, 98, 1)
    results = []
    for message in (70, 9, 1):
        results.append(_generate(task, cache, {"input_ids": said}, new=task.new // 2))
        said = torch.cat([results[-1].tokens[0], task.prompt(message, message, 1)], 1)
    return Result([r.tokens[0] for r in results], [step for r in results for step in r.logits], cache)


def padded_chat(task: Task, make: MakeCache) -> Result:
    inputs, padding = _rows(task)
    cache = make(padding)
    first = _generate(task, cache, inputs, new=task.new // 2)
    said = torch.cat([first.tokens[0], task.prompt(9, 40, 3)], 1)
    grown = said.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)
    second = _generate(task, cache, {"input_ids": said, "attention_mask": mask}, new=task.new // 2)
    return Result(first.tokens + second.tokens, first.logits + second.logits, cache)


def contrastive(task: Task, make: MakeCache) -> Result:
    """Contrastive search (arXiv 2202.06417) through ``custom_generate``: each step tries four rows and keeps one."""
    cache, logits = make(None), []

    def search(
        model: PreTrainedModel, input_ids: Tensor, generation_config: GenerationConfig, **options: Any
    ) -> Tensor:
        out = model(input_ids, past_key_values=options["past_key_values"], use_cache=True, output_hidden_states=True)
        states = out.hidden_states[-1]
        for _ in range(generation_config.max_new_tokens):
            logits.append(out.logits[:, -1])
            likely = logits[-1].softmax(-1).topk(4)
            cache.batch_repeat_interleave(4)
            out = model(likely.indices.T, past_key_values=cache, use_cache=True, output_hidden_states=True)
            alike = torch.cosine_similarity(states, out.hidden_states[-1], dim=-1).amax(-1)
            best = (0.5 * likely.values[0] - 0.5 * alike).argmax(keepdim=True)
            cache.batch_select_indices(best)
            input_ids = torch.cat([input_ids, likely.indices[:, best]], 1)
            states = torch.cat([states, out.hidden_states[-1][best]], 1)
            out.logits = out.logits[best]
        return input_ids

    tokens = task.model.generate(
        task.prompt(0, 141, 1),
        past_key_values=cache,
        custom_generate=search,
        max_new_tokens=task.new,
        do_sample=False,
    )
    return Result([tokens], logits, cache)


@torch.no_grad()
def rows_by_hand(task: Task, make: MakeCache) -> Result:
    """Rows repeated, selected and reordered between forward passes, by turns."""
    cache = make(None)
    logits: list[Tensor] = []

    def feed(ids: Tensor) -> None:
        logits.append(task.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1])

    def decode(rows: int) -> None:
        for step in range(task.new // 2):
            feed(task.prompt(7 * step, 4, rows)[:, -1:])

    feed(task.prompt(0, 108, 2))
    cache.batch_repeat_interleave(3)
    decode(6)
    cache.batch_select_indices(torch.tensor([5, 0, 0, 4]))
    decode(4)
    cache.reorder_cache(torch.tensor([1, 1, 0, 3]))
    decode(4)
    cache.batch_select_indices(torch.tensor([2]))
    decode(1)
    return Result([step.argmax(-1) for step in logits], logits, cache)


def _assistant(task: Task) -> PreTrainedModel:
    """A model that often agrees with the task's: the same with noise on its last layer."""
    assistant = copy.deepcopy(task.model)
    assistant.set_attn_implementation("sdpa")
    torch.manual_seed(task.seed)
    head = assistant.get_output_embeddings().weight
    head.data += 0.05 * head.data.std() * torch.randn_like(head)
    assistant.generation_config.num_assistant_tokens = 7
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0
    return assistant


MODES: dict[str, Mode] = {
    mode.__name__: mode
    for mode in (
        greedy,
        sampling,
        beam,
        padded_beam,
        prompt_lookup,
        assisted,
        early_exit,
        padded,
        chunked,
        padded_chunked,
        chat,
        padded_chat,
        contrastive,
        rows_by_hand,
    )
}
