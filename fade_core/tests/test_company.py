"""Rows in company do as they would alone: in one batch, when others end early, when they join and leave."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from families import left_padded, tiny_gemma3
from tiny import fresh_seed, tiny_llama
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig
from fade_core.support.memory import live_bytes

END, STEPS = 255, 28
SHORT = {"n_sink": 4, "recent_window": 16, "tile": 16}


class Lopsided(EvictionPolicy):
    """Every other key is worth keeping, and the first head deserves three quarters of what there is."""

    def score(self, view: LayerView) -> Tensor:
        return view.keys.abs().sum(-1)

    def allocate(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
        heads = scores.shape[1]
        first = budget * heads * 3 // 4
        rest = (budget * heads - first) // (heads - 1)
        return torch.stack([first, *[rest] * (heads - 1)], 1)


class LopsidedConfig(PolicyConfig):
    kind: Literal["lopsided"] = "lopsided"

    def build(self) -> Lopsided:
        return Lopsided()


CONFIGS = {
    "heads apart": FadeConfig(
        **SHORT, keys={"kind": "uniform", "axis": "token"}, policy=LopsidedConfig(budget=0.6, every=8)
    ),
    "a count": FadeConfig(**SHORT, policy=LopsidedConfig(budget=90, every=8)),
    "ladder": FadeConfig(
        **SHORT, ladder=[{"tier": "int4", "capacity": 0.4}, {"tier": "int2"}], policy={"kind": "h2o", "every": 8}
    ),
    "unbounded": FadeConfig(**SHORT),
}


def tiers(cache: TieredKVCache) -> list[Tensor]:
    return [layer.held.tier_map() for layer in cache.tiered]


def alone(model: torch.nn.Module, config: FadeConfig, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What a prompt ``[T]`` is answered, and where its tokens are then."""
    with create_tiered_cache(model, config) as cache:
        out = model.generate(
            ids[None],
            attention_mask=torch.ones_like(ids[None]),
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=STEPS,
            min_new_tokens=STEPS,
        )
        return out[0, len(ids) :], tiers(cache)


class Ending(LogitsProcessor):
    """The first row ends at its sixth token, the others never do."""

    def __init__(self) -> None:
        self.steps = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        scores[:, END] = -torch.inf
        if self.steps == 6:
            scores[0] = -torch.inf
            scores[0, END] = 0
        return scores


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_go_on_as_alone_when_one_ends_early(name: str) -> None:
    """``generate`` then feeds it padding, until all have ended; what it said before stays as it is, too."""
    seed = fresh_seed()
    model = tiny_llama(seed, layers=2).double()
    model.lm_head.weight.data[END] = 0  # and is said by nobody on their own
    ids, mask = left_padded((150, 203, 61))
    with create_tiered_cache(model, CONFIGS[name]) as cache:
        out = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            do_sample=False,
            max_new_tokens=STEPS,
            eos_token_id=END,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([Ending()]),
        )
        found = tiers(cache)
        assert cache.memory_report().total == live_bytes(cache)
    said = out[:, ids.shape[1] :]
    assert said.shape[1] == STEPS
    assert said[0, 5:].tolist() == [END] + [0] * (STEPS - 6)
    for row, padding in enumerate((mask == 0).sum(-1).tolist()):
        own, wanted = alone(model, CONFIGS[name], ids[row, padding:])
        if row == 0:
            assert torch.equal(said[row, :5], own[:5])
            continue
        assert torch.equal(said[row], own)
        for mine, theirs in zip(found, wanted, strict=True):
            assert torch.equal(mine[row, :, padding:], theirs[0])


def test_a_row_within_its_budget_keeps_everything_whoever_is_over_theirs() -> None:
    """Also the heads that the policy would give less than they hold."""
    torch.manual_seed(fresh_seed())
    model = tiny_llama(fresh_seed(), layers=2)
    ids, mask = left_padded((85, 200))
    with create_tiered_cache(model, CONFIGS["a count"]) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.rank()
        short, long = ((tier >= 0).sum(-1) for tier in tiers(cache)[0])
        assert short.tolist() == [85, 85]
        assert int(long.sum()) <= 2 * 90


def step(model: torch.nn.Module, cache: TieredKVCache, newest: Tensor) -> Tensor:
    length, padding = cache.get_seq_length(), cache.leading_padding[:, None]
    mask = (torch.arange(length + 1) >= padding).long()
    with torch.no_grad():
        out = model(newest, attention_mask=mask, position_ids=length - padding, past_key_values=cache)
    return out.logits[:, -1].argmax(-1, keepdim=True)


@pytest.mark.parametrize("name", [*CONFIGS, "sliding windows too"])
def test_rows_that_join_and_leave_say_what_they_say_alone(name: str) -> None:
    """A short row joins a long one, a longer one joins both, and the first leaves."""
    seed = fresh_seed()
    config = CONFIGS.get(name, CONFIGS["unbounded"])
    model = (tiny_gemma3(seed, layers=3) if name not in CONFIGS else tiny_llama(seed, layers=2)).double()
    prompts = [torch.randint(1, 255, (length,)) for length in (120, 33, 260)]
    said: dict[int, list[int]] = {}
    rows: list[int] = []
    with create_tiered_cache(model, config) as cache, create_tiered_cache(model, config) as spare:
        for row, ids in enumerate(prompts):
            said[row] = [int(spare.prefill(model, ids[None]).logits[0, -1].argmax())]
            cache.add_rows(spare)
            rows.append(row)
            for _ in range(8):
                for place, token in enumerate(step(model, cache, torch.tensor([said[r][-1:] for r in rows]))):
                    said[rows[place]].append(int(token))
        assert cache.keep_rows([2, 1]) == 0
        rows = [2, 1]
        assert cache.keep_rows([1]) == 260 - 33 - 8
        rows = [1]
        for _ in range(9):
            said[1].append(int(step(model, cache, torch.tensor([said[1][-1:]]))))
        assert cache.memory_report().total == live_bytes(cache)
    for row, ids in enumerate(prompts):
        assert said[row] == alone(model, config, ids)[0][: len(said[row])].tolist(), row
