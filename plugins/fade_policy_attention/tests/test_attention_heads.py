"""AdaKV: one budget over the heads of a layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense_run import KV_HEADS, left_padded, tiny_model
from torch import Tensor

from fade_core import EvictionPolicy, FadeConfig, LayerView, create_tiered_cache, get_policy
from fade_core.errors import CheckpointError, ConfigError, InputError, UnknownComponentError
from fade_core.testing import check_component
from fade_policy_attention import AdaKVPolicy, SnapKVPolicy, TovaPolicy
from fade_policy_attention.snapkv import SnapKVConfig


def greedy(scores: Tensor, budget: int, floor: float) -> list[int]:
    """One row ``[H, T]``, token by token: every head's floor first, then the best of all heads."""
    heads = scores.shape[0]
    ranked = [sorted(float(x) for x in head if x > -torch.inf)[::-1] for head in scores]
    counts = [min(int(budget * floor), len(head)) for head in ranked]
    while sum(counts) < heads * budget:
        best = [
            (head[count], -h) for h, (head, count) in enumerate(zip(ranked, counts, strict=True)) if count < len(head)
        ]
        if not best:
            break
        counts[-max(best)[1]] += 1
    return counts


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_heads_share_as_a_greedy_choice_would(floor: float, generator: torch.Generator) -> None:
    batch, heads, tokens = 3, 4, 50
    scale = torch.rand(batch, heads, 1, generator=generator) * 3  # some heads matter more
    scores = torch.rand(batch, heads, tokens, generator=generator) * scale
    scores[torch.rand(batch, heads, tokens, generator=generator) < 0.3] = -torch.inf
    view = LayerView(torch.arange(tokens).expand(batch, heads, tokens), tokens)
    budget = torch.tensor([0, 11, 45])
    found = AdaKVPolicy(TovaPolicy(), floor).allocate(view, scores, budget)
    assert found.tolist() == [greedy(scores[row], int(budget[row]), floor) for row in range(batch)]
    if floor == 1.0:
        assert found[1].tolist() == [11] * heads


def test_scores_are_the_base_policys(generator: torch.Generator) -> None:
    policy = get_policy("adakv", base={"kind": "snapkv", "window": 7, "kernel": 3}, floor=0.5)
    assert isinstance(policy, AdaKVPolicy)
    assert isinstance(policy.base, SnapKVPolicy)
    assert (policy.statistics, policy.observes, policy.floor) == (("window",), 7, 0.5)
    window = torch.rand(2, 2, 9, generator=generator)
    view = LayerView(torch.arange(9).expand(2, 2, 9), 9, statistics={"window": window})
    assert torch.equal(policy.score(view), policy.base.score(view))
    assert get_policy("adakv", base={"kind": "ema", "decay": 0.5}).decay == 0.5


@pytest.mark.parametrize("base", ["snapkv", "tova", "h2o", "position", "key_norm"])
def test_passes_the_conformance_kit_around_any_policy(base: str, seed: int) -> None:
    report = check_component("policies:adakv", fields={"base": {"kind": base}}, seed=seed)
    assert report.ok, report


def test_a_head_that_matters_more_keeps_more(seed: int, generator: torch.Generator) -> None:
    """The second head's tokens are worth more at every rank, but for its floor the first one loses all."""

    class Biased(EvictionPolicy):
        def score(self, view: LayerView) -> Tensor:
            return torch.rand(view.positions.shape, generator=generator) + torch.arange(KV_HEADS)[:, None]

    model = tiny_model(seed)
    ids, mask = left_padded((130, 110), generator)
    short = {"n_sink": 2, "recent_window": 16, "tile": 16, "ladder": [{"tier": "fp16"}]}
    config = FadeConfig(**short, policy={"kind": "adakv", "budget": 66, "floor": 0.4})
    with create_tiered_cache(model, config=config) as cache, torch.no_grad():
        for layer in cache.tiered:
            layer.plan.policy = AdaKVPolicy(Biased(), floor=0.4)
        model(ids, attention_mask=mask, past_key_values=cache)
        for layer in cache.tiered:
            kept = (layer.held.tier_map() >= 0).sum(-1)
            for row, length in enumerate((130, 110)):
                window = 18 + (length - 18) % 16
                tiles = KV_HEADS * (66 - window) // 16
                low = round(0.4 * (66 - window) / 16)
                assert ((kept[row] - window) // 16).tolist() == [low, tiles - low]


@pytest.mark.parametrize(
    ("allocated", "message"),
    [
        (lambda budget: budget[:, None].float().expand(-1, KV_HEADS), "allocated torch.float32"),
        (lambda budget: budget, r"\[B, H_kv\] = \(1, 2\)"),
        (lambda budget: budget[:, None].expand(-1, KV_HEADS) - 1000, "none of it negative"),
        (lambda budget: budget[:, None].expand(-1, KV_HEADS) + 1, "the budget is"),
    ],
)
def test_an_allocation_that_cannot_be_is_refused(allocated: Any, message: str, seed: int) -> None:
    class Wrong(AdaKVPolicy):
        def allocate(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor:
            found: Tensor = allocated(budget)
            return found

    ids = torch.arange(100)[None] % 96
    config = FadeConfig(n_sink=2, recent_window=16, tile=16, policy={"kind": "adakv", "budget": 50})
    model = tiny_model(seed)
    with create_tiered_cache(model, config=config) as cache, torch.no_grad():
        for layer in cache.tiered:
            layer.plan.policy = Wrong(layer.plan.policy.base)
        with pytest.raises(InputError, match=message):
            model(ids, past_key_values=cache)


def test_a_configuration_file_builds_it(tmp_path: Path) -> None:
    file = tmp_path / "fade.toml"
    file.write_text(
        '[policy]\nkind = "adakv"\nbudget = 0.5\nevery = 32\nfloor = 0.1\nbase = { kind = "snapkv", window = 16 }\n'
    )
    config = FadeConfig.from_file(file)
    policy = config.policy.build()
    assert isinstance(policy, AdaKVPolicy)
    assert policy.floor == 0.1
    assert policy.base.observes == 16
    for name in ("again.toml", "again.yaml", "again.json"):
        config.to_file(tmp_path / name)
        assert FadeConfig.from_file(tmp_path / name) == config
    assert "adakv" in str(FadeConfig.json_schema())


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"base": {"kind": "snapkv", "budget": 0.5}}, r"base\.budget=0\.5 has no effect; write budget beside base"),
        ({"base": {"kind": "snapkv", "every": 8}}, r"base\.every=8 has no effect"),
        ({"base": "snapkv"}, "a table with 'kind' is needed"),
        ({"floor": 1.5}, "floor"),
    ],
)
def test_fields_that_cannot_work_are_refused(fields: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        get_policy("adakv", **fields)


def test_a_base_that_nothing_provides_is_named() -> None:
    with pytest.raises(UnknownComponentError, match="did you mean 'snapkv'"):
        get_policy("adakv", base={"kind": "snapkw"})


def test_the_base_may_refuse_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, model: Any) -> None:
        raise CheckpointError("trained on another model")

    monkeypatch.setattr(SnapKVConfig, "check_model", refuse)
    with pytest.raises(CheckpointError, match="trained on another model"):
        create_tiered_cache(tiny_model(0), FadeConfig(policy={"kind": "adakv", "budget": 0.5}))
