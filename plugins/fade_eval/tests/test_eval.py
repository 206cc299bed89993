"""The evaluation harness against figures computed without it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tiny import byte_tokenizer, fresh_seed, tiny_llama
from torch import Tensor
from transformers import DynamicCache

from fade_core.cache.named_caches import configuration
from fade_core.errors import ConfigError, FadeError, InputError
from fade_core.plugins import Registry, use_registry
from fade_core.plugins.hookspecs import hookimpl
from fade_eval import divergence, exact_runs, needle, perplexity
from fade_eval.haystack import needle_prompts
from fade_eval.results import standard_error
from fade_eval.tasks import EvalOptions, EvalTask, eval_task


class ScaledValues(DynamicCache):
    """Wrong on purpose: every value that is stored is scaled, those of a prompt are exact for the prompt itself."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        before = self.get_seq_length(layer)
        keys, values = super().update(key, value * self.factor, layer, *args, **kwargs)
        return (keys, values) if before else (key, value)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture
def ids() -> Tensor:
    torch.manual_seed(fresh_seed())
    return torch.randint(0, 256, (3, 61))


@torch.no_grad()
def dense_log_probs(model: Any, row: Tensor) -> Tensor:
    return model(row[None], use_cache=False).logits[0].log_softmax(-1)


def test_exact_cache_has_no_divergence_and_the_perplexity_of_a_plain_forward(model: Any, ids: Tensor) -> None:
    result = divergence(model, ids, "exact", prompt_tokens=40, steps=20)
    assert (result.kl_mean, result.kl_max, result.kl_p99, result.top1_agreement) == (0, 0, 0, 1)
    losses = [-dense_log_probs(model, row)[40:60].gather(1, row[41:, None]) for row in ids]
    assert result.perplexity == pytest.approx(float(torch.cat(losses).mean().exp()), rel=1e-4)
    assert result.perplexity == result.exact_perplexity
    assert result.perplexity_change == 0
    assert (result.texts, result.steps, len(result.per_text)) == (3, 20, 3)


@pytest.mark.parametrize(("steps_per_forward", "batch_size"), [(1, 1), (7, 1), (1, 2), (7, 3)])
def test_divergence_of_a_wrong_cache_is_that_of_a_loop_written_out(
    model: Any, ids: Tensor, steps_per_forward: int, batch_size: int
) -> None:
    result = divergence(
        model,
        list(ids),
        cache_factory=lambda _: ScaledValues(0.7),
        prompt_tokens=40,
        steps=20,
        steps_per_forward=steps_per_forward,
        batch_size=batch_size,
    )
    kls, same = [], []
    with torch.no_grad():
        for row in ids:
            cache = ScaledValues(0.7)
            model(row[None, :40], past_key_values=cache)
            found = torch.cat(
                [
                    model(part[None], past_key_values=cache).logits[0].log_softmax(-1)
                    for part in row[40:60].split(steps_per_forward)
                ]
            )
            wanted = dense_log_probs(model, row)[40:60]
            kls.append(torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="none").sum(-1))
            same.append(found.argmax(-1) == wanted.argmax(-1))
    kl = torch.cat(kls)
    assert result.kl_mean == pytest.approx(float(kl.mean()), rel=1e-3)
    assert result.kl_max == pytest.approx(float(kl.max()), rel=1e-3)
    assert result.kl_p99 == pytest.approx(float(kl.double().quantile(0.99)), rel=1e-3)
    assert result.kl_mean > 1e-3, "the wrong cache must show"
    assert result.top1_agreement == pytest.approx(float(torch.cat(same).double().mean()), abs=1 / 60)
    means = torch.stack([k.mean() for k in kls]).double()
    assert result.kl_standard_error == pytest.approx(float(means.std() / math.sqrt(3)), rel=1e-3)
    json.dumps(result.to_dict())


def test_the_prompt_is_not_what_is_measured(model: Any, ids: Tensor) -> None:
    """A cache that is wrong from the second forward on scores as wrong, though its prompt logits are exact."""
    exact = perplexity(model, ids, "exact", prompt_tokens=40, steps=20)
    wrong = perplexity(model, ids, lambda _: ScaledValues(0.2), prompt_tokens=40, steps=20)
    assert abs(wrong.nll - exact.nll) > 1e-3


def test_bytes_are_those_of_the_tensors(model: Any, ids: Tensor) -> None:
    result = divergence(model, ids, "exact", prompt_tokens=40, steps=20)
    exact = 3 * 2 * 60 * 2 * 16 * 4  # layers, K and V, tokens, heads, channels, float32
    assert result.held.cache == result.held.exact == exact
    assert (result.held.exact_16bit, result.held.ratio, result.held.ratio_16bit) == (exact / 2, 1, 2)
    assert perplexity(model, ids, "exact", prompt_tokens=40, steps=20).bytes_held == exact


def test_exact_runs_serve_several_caches(model: Any, ids: Tensor) -> None:
    runs = exact_runs(model, ids, prompt_tokens=40, steps=20)
    factory = lambda _: ScaledValues(0.9)  # noqa: E731
    reused = divergence(model, config=factory, exact=runs, prompt_tokens=40, steps=20)
    assert reused == divergence(model, ids, factory, prompt_tokens=40, steps=20)


def test_perplexity_agrees_with_divergence_and_reports_progress(model: Any, ids: Tensor) -> None:
    calls: list[tuple[int, int]] = []
    found = perplexity(
        model, ids, "exact", prompt_tokens=40, steps=20, progress=lambda done, total: calls.append((done, total))
    )
    assert found.perplexity == divergence(model, ids, "exact", prompt_tokens=40, steps=20).perplexity
    assert found.tokens == 60
    assert calls[-1] == (60, 60)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_strings_lists_and_shipped_texts_are_texts(model: Any) -> None:
    tokenizer = byte_tokenizer()
    text = "It was the best of times, it was the worst of times, it was the age of wisdom."
    options: dict[str, Any] = {"prompt_tokens": 40, "steps": 20}
    as_string = perplexity(model, text, "exact", tokenizer=tokenizer, **options)
    as_ids = perplexity(model, list(tokenizer(text)["input_ids"]), "exact", **options)
    assert as_string == as_ids
    shipped = perplexity(model, None, "exact", tokenizer=tokenizer, max_texts=2, **options)
    assert shipped.texts == 2
    assert shipped.per_text[0] != shipped.per_text[1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"prompt_tokens": 50, "steps": 20}, "71 are needed"),
        ({"prompt_tokens": 0}, "prompt_tokens must be"),
        ({"steps": 1.5}, "steps must be"),
        ({"steps_per_forward": 0}, "steps_per_forward must be"),
        ({"texts": "words"}, "tokenizer"),
        ({"texts": torch.rand(1, 80)}, "whole numbers"),
        ({"texts": []}, "no text"),
        ({"max_texts": 0}, "max_texts must be"),
        ({"config": "saef"}, "did you mean 'safe'"),
        ({"config": "missing.toml"}, "no such file"),
    ],
)
def test_bad_input_is_explained(model: Any, ids: Tensor, options: dict[str, Any], wanted: str) -> None:
    arguments = {"texts": ids, "config": "exact", "prompt_tokens": 40, "steps": 20} | options
    with pytest.raises(FadeError, match=wanted):
        divergence(model, **arguments)


def test_configurations_are_resolved(tmp_path: Any) -> None:
    (tmp_path / "mine.toml").write_text("recent_window = 128\n")
    assert configuration(tmp_path / "mine.toml").recent_window == 128
    assert configuration({"recent_window": 32}).recent_window == 32
    assert configuration("safe") == configuration("safe")
    with pytest.raises(ConfigError, match="recent_windw"):
        configuration({"recent_windw": 1})


def test_standard_error() -> None:
    assert standard_error([1.0]) is None
    assert standard_error([1.0, 3.0]) == pytest.approx(1.0)


# --- needle ---


def test_needles_lie_where_they_should() -> None:
    tokenizer = byte_tokenizer()
    prompts = needle_prompts(tokenizer, 4, 300, (0.0, 0.5, 1.0), seed=fresh_seed(), haystack="straw " * 99)
    for prompt, depth in zip(prompts, (0.0, 0.5, 1.0, 0.0), strict=True):
        text = tokenizer.decode(prompt.context[0])
        assert prompt.context.shape == (1, 300)
        sentence = f" The special magic number for {prompt.city} is {prompt.number}. "
        assert text.index(sentence) == int((300 - len(sentence)) * depth)
        assert prompt.number not in tokenizer.decode(prompt.question[0])
        assert tokenizer.decode(prompt.answer) == f" {prompt.number}"
    assert len({prompt.number for prompt in prompts}) == 4


class Copying(torch.nn.Module):
    """A stand-in for a model that can read: it answers with the last five digits that its cache still holds."""

    config, dtype, device = None, torch.float32, torch.device("cpu")

    def forward(self, input_ids: Tensor, past_key_values: Any, use_cache: bool = True) -> Any:
        key = input_ids[:, None, :, None].float()
        keys, _ = past_key_values.update(key, key, 0)
        text = byte_tokenizer().decode(keys[0, 0, :, 0].long())
        digits, said = text.rpartition(" is")[0], text.rpartition(" is")[2]
        number = " " + "".join(c for c in digits if c.isdigit())[-5:]
        logits = torch.zeros(1, input_ids.shape[1], 256)
        follows = byte_tokenizer()(number[len(said) : len(said) + 1] or " ")["input_ids"][0]
        logits[0, -1, follows] = 1
        return type("Out", (), {"logits": logits})


class Forgetting(DynamicCache):
    """Loses the first half of the prompt once it has been read."""

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.get_seq_length(layer) == 300:
            held = self.layers[layer]
            held.keys, held.values = held.keys[:, :, 150:].clone(), held.values[:, :, 150:].clone()
        return super().update(key, value, layer, *args, **kwargs)


def test_needle_counts_what_a_cache_lost() -> None:
    options: dict[str, Any] = {"needles": 6, "context_tokens": 300, "depths": (0.2, 0.8), "haystack": "straw " * 99}
    lost = needle(Copying(), byte_tokenizer(), lambda _: Forgetting(), seed=fresh_seed(), **options)
    assert (lost.needles, lost.exact_found, lost.found, lost.kept) == (6, 6, 3, 3)
    assert [answer.found for answer in lost.answers] == [False, True] * 3
    assert 0.5 < lost.held.ratio < 0.8
    json.dumps(lost.to_dict())


def test_needle_that_does_not_fit_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match="no room"):
        needle(model, byte_tokenizer(), "exact", context_tokens=30)
    with pytest.raises(InputError, match="depths"):
        needle(model, byte_tokenizer(), "exact", depths=(1.5,))


# --- tasks ---


class Length(EvalTask):
    """A plugin's task: how long the prompt is."""

    name = "length"
    summary = "prompt tokens"

    def run(self, model: Any, tokenizer: Any, cache: Any, options: EvalOptions) -> Any:
        return perplexity(
            model, options.texts, cache, tokenizer=tokenizer, prompt_tokens=options.prompt_tokens, steps=1
        )


class Plugin:
    @staticmethod
    @hookimpl
    def fade_eval_tasks() -> list[Any]:
        return [Length]


def test_a_plugins_task_is_found_by_name(model: Any, ids: Tensor) -> None:
    with use_registry(Registry([Plugin()], entry_points=False)):
        result = eval_task("length").run(model, None, "exact", EvalOptions(texts=ids, prompt_tokens=12))
        assert result.to_dict()["tokens"] == 3
        with pytest.raises(FadeError, match=r"lenght.*length"):
            eval_task("lenght")


def test_built_in_tasks_come_through_the_same_door(model: Any, ids: Tensor) -> None:
    for name in ("divergence", "perplexity"):
        result = eval_task(name).run(model, None, "exact", EvalOptions(texts=ids, prompt_tokens=12, steps=3, count=2))
        assert result.to_dict()["texts"] == 2
    asked = eval_task("needle").run(
        model, byte_tokenizer(), "exact", EvalOptions(texts="straw " * 99, prompt_tokens=128, count=2)
    )
    assert asked.to_dict()["needles"] == 2
