"""FADE's decode loop chooses the tokens of ``generate``'s own, and leaves the cache as that does; its steps are recorded."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_compiled_configs import PROMPT, cache_of
from test_modes import FAMILIES, LADDERS, PACKED
from tinymodels import by_turns, fresh_seed, left_padded, prompt, tiny
from torch import Tensor
from torch.utils._pytree import tree_flatten
from transformers import DynamicCache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache, decode_loop
from fade_core.cache.lean_modules import LeanModules
from fade_core.cache.step_recorder import StepRecorder
from fade_core.errors import InputError
from fade_core.support.memory import live_bytes

NEW = 32


@functools.cache
def model(family: str = "llama") -> PreTrainedModel:
    small = {"num_hidden_layers": 1, "head_dim": 32} if family == "llama" else {}
    return tiny(family, fresh_seed(), **FAMILIES[family] | small)


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[StepRecorder]:
    """The recorders that loops make."""
    found: list[StepRecorder] = []

    class Noted(StepRecorder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr("fade_core.cache.decode_loop.StepRecorder", Noted)
    return found


def inputs(seed: int = 1) -> dict[str, Tensor]:
    """Two prompts, one of them padded."""
    return left_padded([prompt(seed, PROMPT)[0], prompt(seed + 1, PROMPT - 21)[0]])


def answer(network: PreTrainedModel, cache: Any, given: dict[str, Tensor], loop: bool, **options: Any) -> Any:
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "disable_compile": True, "pad_token_id": 0}
    settings |= {"return_dict_in_generate": True, "output_logits": True, "output_scores": True} | options
    if loop:
        settings |= {"custom_generate": decode_loop, "record": True}
    torch.manual_seed(7)
    return network.generate(**given, past_key_values=cache, **settings)


def contents(cache: TieredKVCache) -> list[Any]:
    return tree_flatten(cache.cache_state_dict())[0]


def same(found: Any, wanted: Any) -> None:
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in ((found.logits, wanted.logits), (found.scores, wanted.scores)):
        assert len(ours) == len(theirs)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    for a, b in zip(contents(found.past_key_values), contents(wanted.past_key_values), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize(
    ("name", "length"), by_turns(PROMPT + NEW, ["safe", "aggressive", "two tiers", "contiguous", "self-calibrated"])
)
def test_tokens_scores_and_cache_are_those_of_generate(
    name: str, length: int | None, recorders: list[StepRecorder]
) -> None:
    given = inputs()
    wanted = answer(model(), cache_of(name, model(), length), given, loop=False)
    same(answer(model(), cache_of(name, model(), length), given, loop=True), wanted)
    assert recorders[0].refusal == ""
    assert recorders[0].replayed > NEW // 2


@pytest.mark.parametrize(("name", "after", "length"), [("safe", 1, None), ("safe", 27, 250), ("aggressive", 20, None)])
def test_what_came_after_the_end_is_taken_back(name: str, after: int, length: int | None) -> None:
    """Each row ends by a token of its own, the longer one ``after`` tokens in."""
    given = inputs(after)
    free = answer(model(), cache_of(name, model(), None), given, loop=False).sequences[:, PROMPT:]
    ends = [int(free[0, after]), int(free[1, after // 2])]
    wanted = answer(model(), cache_of(name, model(), length), given, loop=False, eos_token_id=ends)
    found = answer(model(), cache_of(name, model(), length), given, loop=True, eos_token_id=ends)
    same(found, wanted)
    again = torch.cat([found.sequences, prompt(3, 5, 2)], 1)
    options = {"input_ids": again, "attention_mask": torch.cat([given["attention_mask"], torch.ones_like(again)], 1)}
    options["attention_mask"] = options["attention_mask"][:, : again.shape[1]]
    going_on = [answer(model(), one.past_key_values, options, loop=False, max_new_tokens=4) for one in (found, wanted)]
    assert torch.equal(going_on[0].sequences, going_on[1].sequences)


def test_sampling_draws_what_generate_draws() -> None:
    options = {"do_sample": True, "top_k": 20, "temperature": 0.8, "repetition_penalty": 1.2}
    wanted = answer(model(), cache_of("safe", model(), None), inputs(), loop=False, **options)
    same(answer(model(), cache_of("safe", model(), None), inputs(), loop=True, **options), wanted)


class Kept(BaseStreamer):
    def __init__(self) -> None:
        self.put_in: list[Tensor] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        self.put_in.append(value)

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("ends", [True, False])
def test_a_streamer_is_given_every_token_once(ends: bool) -> None:
    given = {"input_ids": prompt(5, PROMPT), "attention_mask": torch.ones(1, PROMPT, dtype=torch.long)}
    free = answer(model(), cache_of("safe", model(), None), given, loop=False).sequences[0, PROMPT:]
    options = {"eos_token_id": int(free[27])} if ends else {}
    kept = {loop: Kept() for loop in (False, True)}
    for loop, streamer in kept.items():
        answer(model(), cache_of("safe", model(), None), given, loop, streamer=streamer, **options)
    assert [t.tolist() for t in kept[True].put_in] == [t.tolist() for t in kept[False].put_in]
    assert kept[True].ended == kept[False].ended == 1


def test_an_assistant_is_refused() -> None:
    with pytest.raises(InputError, match="assistant model; drafts need generate without custom_generate"):
        answer(model(), cache_of("safe", model(), None), inputs(), loop=True, assistant_model=model())


class Seen(StoppingCriteria):
    """Somebody's own: it must not see tokens that are not there."""

    looks_ahead = False

    def __init__(self, stop: int) -> None:
        self.lengths: list[int] = []
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.lengths.append(input_ids.shape[1])
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.stop)


def test_criteria_of_ones_own_see_no_token_after_the_end() -> None:
    seen = {loop: Seen(PROMPT + 21) for loop in (False, True)}
    for loop, one in seen.items():
        stops = StoppingCriteriaList([one])
        found = answer(model(), cache_of("safe", model(), None), inputs(), loop, stopping_criteria=stops)
        assert found.sequences.shape[1] == PROMPT + 21
    assert seen[True].lengths == seen[False].lengths
    beyond = []
    for stop in (21, 26):  # one of them may be where the host asks
        one = Seen(PROMPT + stop)
        one.looks_ahead = True
        stops = StoppingCriteriaList([one])
        found = answer(model(), cache_of("safe", model(), None), inputs(), True, stopping_criteria=stops)
        assert found.sequences.shape[1] == PROMPT + stop
        beyond.append(max(one.lengths) > PROMPT + stop)
    assert any(beyond)


@pytest.mark.parametrize(
    ("reason", "options", "make"),
    [
        ("beam search", {"num_beams": 2}, lambda: cache_of("safe", model(), None)),
        ("DynamicCache", {}, lambda: DynamicCache(config=model().config)),
        ("attention weights", {"output_hidden_states": True}, lambda: cache_of("safe", model(), None)),
    ],
)
def test_what_it_cannot_do_is_left_to_generate_with_a_warning(
    reason: str, options: dict[str, Any], make: Callable[[], Any]
) -> None:
    given = inputs()
    with pytest.warns(UserWarning, match=f"generate's own loop: .*{reason}"):
        found = answer(model(), make(), given, loop=True, max_new_tokens=6, **options)
    wanted = answer(model(), make(), given, loop=False, max_new_tokens=6, **options)
    assert torch.equal(found.sequences, wanted.sequences)


@pytest.mark.parametrize("ladder", ["channel_keys", "h2o"])
def test_transformers_fixed_windows_are_recorded_too(ladder: str, recorders: list[StepRecorder]) -> None:
    """Their window of 24 fills up on the way, which goes another way through their code."""
    network, config = model("gemma3_text"), (PACKED | LADDERS)[ladder]
    given = {"input_ids": prompt(4, 20), "attention_mask": torch.ones(1, 20, dtype=torch.long)}
    made = [create_tiered_cache(network, config, 20 + NEW) for _ in range(2)]
    wanted, found = (answer(network, cache, given, loop) for cache, loop in zip(made, (False, True), strict=True))
    assert torch.equal(found.sequences, wanted.sequences)
    assert recorders[0].recorded == 2
    assert recorders[0].refusal == ""


def test_growing_sliding_windows_are_run_one_by_one(recorders: list[StepRecorder]) -> None:
    network = model("gemma3_text")
    given = {"input_ids": prompt(4, 40), "attention_mask": torch.ones(1, 40, dtype=torch.long)}
    with pytest.warns(UserWarning, match="run one by one, not recorded: layer 0: transformers' sliding window grows"):
        found = answer(network, create_tiered_cache(network, PACKED["token_keys"]), given, loop=True, max_new_tokens=9)
    wanted = answer(network, create_tiered_cache(network, PACKED["token_keys"]), given, loop=False, max_new_tokens=9)
    assert torch.equal(found.sequences, wanted.sequences)
    assert recorders[0].recorded == 0


def test_a_model_that_cannot_be_recorded_is_run_as_it_is(
    monkeypatch: pytest.MonkeyPatch, recorders: list[StepRecorder]
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(StepRecorder, "_record", fails)
    with pytest.warns(UserWarning, match="LlamaForCausalLM cannot be recorded: operation not permitted"):
        found = answer(model(), cache_of("safe", model(), None), inputs(), loop=True)
    same(found, answer(model(), cache_of("safe", model(), None), inputs(), loop=False))
    assert recorders[0].replayed == 0


def test_a_cache_that_grows_is_recorded_again_where_it_grows_and_keeps_nothing(recorders: list[StepRecorder]) -> None:
    config = FadeConfig(n_sink=4, recent_window=16, tile=16)
    caches = [create_tiered_cache(model(), config) for _ in range(2)]
    long = {"max_new_tokens": 90}
    answers = [answer(model(), one, inputs(), loop, **long) for one, loop in zip(caches, (True, False), strict=True)]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert 1 <= recorders[0].recorded <= 4  # two rows send a tile down every 16 tokens each
    assert recorders[0].replayed > 80
    assert not caches[0].is_compileable
    caches[1].settle()
    assert live_bytes(caches[0]) <= 1.02 * live_bytes(caches[1])


def test_nothing_is_recorded_on_a_cpu_by_itself(recorders: list[StepRecorder]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model().generate(
            **inputs(), past_key_values=cache_of("safe", model(), None), max_new_tokens=4, custom_generate=decode_loop
        )
    assert recorders[0].recorded == 0


# --- fewer launches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_lean_modules_give_what_the_model_gives(family: str) -> None:
    network = tiny(family, fresh_seed(), torch.bfloat16, initializer_range=0.05)
    drawn = torch.get_rng_state()
    lean = LeanModules(network)
    assert torch.equal(torch.get_rng_state(), drawn)  # sampled tokens are drawn from it
    assert len(lean.norms) == sum(type(m).__name__.endswith("RMSNorm") for m in network.modules())
    assert len(lean.rotaries) == 1
    ids = prompt(2, 12, 2)
    exact = tiny(family, fresh_seed(), torch.float64, initializer_range=0.05)
    exact.load_state_dict(network.state_dict())
    with torch.no_grad():
        wanted, plain = exact(ids).logits, network(ids).logits.double()
        with lean.in_place():
            found = network(ids).logits.double()
        assert torch.equal(network(ids).logits.double(), plain)  # nothing is left in the model
    assert not torch.equal(found, plain)
    assert (found - wanted).norm() <= 1.5 * (plain - wanted).norm()


def test_other_norms_and_rotaries_stay() -> None:
    network = tiny("cohere", fresh_seed(), torch.bfloat16, head_dim=...)  # turns neighbouring channels
    assert LeanModules(network).rotaries == []
    network = tiny("llama", fresh_seed(), torch.bfloat16)
    norm = network.model.norm
    norm.__class__ = type("OddRMSNorm", (type(norm),), {"forward": lambda self, x: 2 * x})
    assert norm not in [module for module, _ in LeanModules(network).norms]
    assert LeanModules(model()).norms == []  # not in half precision
