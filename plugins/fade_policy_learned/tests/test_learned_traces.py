from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM

from fade_core import FadeConfig, create_tiered_cache
from fade_core.errors import InputError, NonFiniteError, UnsupportedModelError
from fade_policy_learned import FEATURES, Geometry, LearnedPolicy, Traces, collect, policy, token_features, train_policy
from fade_policy_learned.watching import Attention

SINK, WINDOW = 2, 16


def ids(generator: torch.Generator, tokens: int) -> torch.Tensor:
    return torch.randint(64, (tokens,), generator=generator)


def by_head(traces: Traces, layer: int, head: int, cut: int, cuts: int = 1) -> torch.Tensor:
    """Where the tokens of one list lie; there are two layers and two heads."""
    return traces.lists == (layer * cuts + cut) * 2 + head


@pytest.mark.parametrize("decoding", [False, True])
def test_features_are_those_of_a_policy_at_work(
    model: LlamaForCausalLM,
    generator: torch.Generator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decoding: bool,
) -> None:
    random = torch.rand(400, len(FEATURES), generator=generator)
    geometry = Geometry(2, 2, 16)
    train_policy(random, random[:, 0], geometry=geometry, epochs=1).policy.save(tmp_path / "p.safetensors")
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def recorded(view: Any) -> torch.Tensor:
        order = view.positions.sort(-1)
        features = token_features(view).gather(2, order.indices[..., None].expand(-1, -1, -1, len(FEATURES)))
        seen.append((order.values, features))
        return token_features(view)

    monkeypatch.setattr(policy, "token_features", recorded)
    cut, future = 130, 20
    text = ids(generator, cut + future)
    config = FadeConfig(
        n_sink=SINK,
        recent_window=WINDOW,
        ladder=[{"tier": "fp16"}],
        policy={"kind": "learned", "checkpoint": str(tmp_path / "p.safetensors"), "budget": 40, "every": 60},
    )
    prompt = 70 if decoding else cut  # 70: nothing has left the window yet when the first ranking comes, after 60 steps
    with create_tiered_cache(model, config) as cache, torch.no_grad():
        model(text[None, :prompt], past_key_values=cache)
        for t in range(prompt, cut):
            model(text[None, t : t + 1], past_key_values=cache)
    traces = collect(model, [text], cuts=1, future=future, n_sink=SINK, recent_window=WINDOW)
    assert traces.geometry == geometry
    assert len(seen) == 2
    for layer, (positions, features) in enumerate(seen):
        assert torch.equal(positions, torch.arange(cut).expand(1, 2, -1))
        for head in range(2):
            found = traces.features[by_head(traces, layer, head, 0)]
            torch.testing.assert_close(features[0, head, SINK : cut - WINDOW], found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("target", ["mass", "movement"])
def test_targets_are_those_of_dense_attention(model: LlamaForCausalLM, generator: torch.Generator, target: Any) -> None:
    text, future = ids(generator, 150), 30
    cuts = (60, 120)
    traces = collect(model, [text], cuts=2, future=future, target=target, n_sink=SINK, recent_window=WINDOW)
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        dense = model(text[None], past_key_values=cache, output_attentions=True).attentions
    for layer in range(2):
        values = cache.layers[layer].values[0].double()
        weight = model.model.layers[layer].self_attn.o_proj.weight.double()
        for number, cut in enumerate(cuts):
            worth = torch.zeros(2, cut, dtype=torch.float64)
            for head in range(4):
                share = dense[layer][0, head].double()
                own = values[head // 2]
                for t in range(cut, cut + future):
                    given = share[t, :cut]
                    if target == "mass":
                        worth[head // 2] += given / 2
                    else:
                        away = (own[:cut] - share[t] @ own) @ weight[:, head * 16 : head * 16 + 16].T
                        worth[head // 2] += given.square() * away.square().sum(-1)
            wanted = worth[:, SINK : cut - WINDOW]
            wanted = wanted / wanted.mean()
            for head in range(2):
                found = traces.targets[by_head(traces, layer, head, number, 2)].double()
                torch.testing.assert_close(found, wanted[head], rtol=1e-3, atol=1e-4)


def test_nothing_of_the_model_is_changed_and_runs_repeat(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    texts = [ids(generator, 120), ids(generator, 140)]
    before = model.config._attn_implementation
    runs = [collect(model, texts, future=20, recent_window=WINDOW, samples=9, seed=seed) for seed in (3, 3, 4)]
    assert model.config._attn_implementation == before
    assert torch.equal(runs[0].features, runs[1].features)
    assert torch.equal(runs[0].targets, runs[1].targets)
    assert not torch.equal(runs[0].features, runs[2].features)  # other tokens are drawn
    assert len(runs[0].targets) == 2 * 3 * 2 * 2 * 9  # texts, cuts, layers, heads, samples
    assert runs[0].texts.tolist() == [0] * 108 + [1] * 108


def test_soft_caps_sinks_and_sliding_windows(generator: torch.Generator) -> None:
    q, k = torch.randn(2, 3, 7, 4, generator=generator), torch.randn(2, 7, 4, generator=generator)
    sinks = torch.randn(6, generator=generator)
    found = Attention(0, q, k, k, 2.0, sinks, 3).probabilities(slice(4, 6))
    for h in range(2):
        for g in range(3):
            for t in (4, 5):
                logits = 2 * torch.tanh(k[h] @ q[h, g, t] / 2)
                shown = torch.cat([logits[t - 2 : t + 1], sinks[h * 3 + g, None]]).softmax(0)
                wanted = torch.zeros(7)
                wanted[t - 2 : t + 1] = shown[:-1]
                torch.testing.assert_close(found[h, g, t - 4], wanted)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (100, {}, "texts must have 264 tokens or more.*found \\[100\\]"),
        (300, {"target": "worth"}, "no target is called 'worth'; there are movement, mass"),
        (300, {"cuts": 0}, "cuts must be at least 1"),
        (300, {"n_sink": -1}, "must not be negative"),
    ],
)
def test_bad_input_is_refused(
    model: LlamaForCausalLM, generator: torch.Generator, tokens: int, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        collect(model, [ids(generator, tokens)], **options)
    with pytest.raises(InputError, match="found no text"):
        collect(model, [])


def test_models_that_nothing_can_be_learnt_from_are_refused(
    model: LlamaForCausalLM, generator: torch.Generator
) -> None:
    text = ids(generator, 300)
    for layer in model.model.layers:
        layer.self_attn.c_out = layer.self_attn.o_proj
        projection = layer.self_attn.o_proj
        del layer.self_attn.o_proj
    with pytest.raises(UnsupportedModelError, match=r"no output projection.*target 'mass'"):
        collect(model, [text])
    for layer in model.model.layers:
        layer.self_attn.o_proj = projection
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="keys of layer 1 are not finite"):
        collect(model, [text])
    assert LearnedPolicy.statistics == ("mass", "seen", "ema", "last")
