"""Every way to generate that a cache has to survive, as functions of a model and something that makes its cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tinymodels import left_padded, prompt
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

MakeCache = Callable[[Tensor | None], Cache]
"""A fresh cache, given the padding of each row (int64 ``[B]``) or ``None``."""


@dataclass(frozen=True)
class Result:
    """What a mode gave: token ids, the logits they came from where the mode tells them, and the cache."""

    tokens: list[Tensor]
    logits: list[Tensor]
    cache: Cache


Mode = Callable[[PreTrainedModel, MakeCache, int], Result]
NEW = 40


def _generate(model: PreTrainedModel, cache: Cache, inputs: dict[str, Tensor], **options: Any) -> Result:
    """One call of ``generate``, greedy unless told otherwise, that never ends early."""
    settings: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | options
    ids = inputs["input_ids"]
    mask = inputs.get("attention_mask", torch.ones_like(ids))
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return Result([out.sequences], list(out.logits), cache)


def _rows(seed: int) -> tuple[dict[str, Tensor], Tensor]:
    inputs = left_padded([prompt(seed + i, length)[0] for i, length in enumerate((133, 50, 171))])
    return inputs, (inputs["attention_mask"] == 0).sum(-1)


def greedy(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    return _generate(model, make(None), {"input_ids": prompt(seed, 150)}, max_new_tokens=60, min_new_tokens=60)


def sampling(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    torch.manual_seed(seed)
    return _generate(model, make(None), {"input_ids": prompt(seed, 120, rows=2)}, do_sample=True, top_k=20)


def beam(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    return _generate(model, make(None), {"input_ids": prompt(seed, 110)}, num_beams=4)


def padded_beam(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    inputs, padding = _rows(seed)
    return _generate(model, make(padding), inputs, num_beams=3)


def prompt_lookup(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    return _generate(model, make(None), {"input_ids": prompt(seed, 160)}, prompt_lookup_num_tokens=5)


def assisted(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    return _generate(model, make(None), {"input_ids": prompt(seed, 111)}, assistant_model=_assistant(model, seed))


def padded(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    inputs, padding = _rows(seed)
    return _generate(model, make(padding), inputs)


def chunked(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    return _generate(model, make(None), {"input_ids": prompt(seed, 170)}, prefill_chunk_size=37)


def padded_chunked(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    """The second row's padding is longer than two chunks."""
    inputs, padding = _rows(seed)
    return _generate(model, make(padding), inputs, prefill_chunk_size=45)


def chat(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    """Three turns: the second adds a long message, the third a short one."""
    cache = make(None)
    said = prompt(seed, 90)
    results = []
    for message in (70, 9, 0):
        results.append(_generate(model, cache, {"input_ids": said}, max_new_tokens=25, min_new_tokens=25))
        said = torch.cat([results[-1].tokens[0], prompt(seed + message, message)], 1)
    return Result([r.tokens[0] for r in results], [step for r in results for step in r.logits], cache)


def padded_chat(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    inputs, padding = _rows(seed)
    cache = make(padding)
    first = _generate(model, cache, inputs, max_new_tokens=20, min_new_tokens=20)
    said = torch.cat([first.tokens[0], prompt(seed + 9, 40, rows=3)], 1)
    grown = said.shape[1] - inputs["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, grown), value=1)
    second = _generate(model, cache, {"input_ids": said, "attention_mask": mask}, max_new_tokens=20, min_new_tokens=20)
    return Result(first.tokens + second.tokens, first.logits + second.logits, cache)


@torch.no_grad()
def rows_by_hand(model: PreTrainedModel, make: MakeCache, seed: int) -> Result:
    """What contrastive and group search do to a cache: rows repeated, selected and cropped between forward passes."""
    cache = make(None)
    ids = prompt(seed, 100, rows=2)
    logits = [model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]]

    def feed(rows: int, steps: int) -> None:
        for step in range(steps):
            token = prompt(seed + 7 * step, 4, rows)[:, -1:]
            logits.append(model(token, past_key_values=cache, use_cache=True).logits[:, -1])

    cache.batch_repeat_interleave(3)  # 6 rows
    feed(6, 20)
    cache.batch_select_indices(torch.tensor([5, 0, 0, 4]))
    feed(4, 20)
    cache.reorder_cache(torch.tensor([1, 1, 0, 3]))
    feed(4, 20)
    cache.batch_select_indices(torch.tensor([2]))
    feed(1, 20)
    return Result([step.argmax(-1) for step in logits], logits, cache)


def _assistant(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model that often agrees with ``model``: the same with noise on its last layer."""
    assistant = copy.deepcopy(model)
    assistant.set_attn_implementation("sdpa")
    torch.manual_seed(seed)
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
        padded,
        chunked,
        padded_chunked,
        chat,
        padded_chat,
        rows_by_hand,
    )
}
