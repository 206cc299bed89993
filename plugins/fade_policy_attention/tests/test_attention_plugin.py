from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from dense_run import left_padded, tiny_model

from fade_core import FadeConfig, LayerView, create_tiered_cache, get_policy
from fade_core.errors import ConfigError, InputError
from fade_core.testing import check_component
from fade_policy_attention import SnapKVPolicy
from fade_policy_attention.plugin import fade_policies

KINDS = [config.model_fields["kind"].default for config in fade_policies()]


def test_the_entry_point_leads_here() -> None:
    (point,) = entry_points(group="fade", name="policy_attention")
    assert point.load().fade_policies() == fade_policies()


@pytest.mark.parametrize("kind", KINDS)
def test_passes_the_conformance_kit(kind: str, seed: int) -> None:
    report = check_component(f"policies:{kind}", seed=seed)
    assert report.ok, report


@pytest.mark.parametrize("fields", [{"pool": "max", "kernel": 7}, {"kernel": 1}])
def test_snapkv_passes_with_other_fields(fields: dict[str, Any], seed: int) -> None:
    report = check_component("policies:snapkv", fields=fields, seed=seed)
    assert report.ok, report


@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_file_builds_it(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "fade.toml"
    file.write_text(f'[policy]\nkind = "{kind}"\nbudget = 0.5\n')
    config = FadeConfig.from_file(file)
    assert config.policy.build().kind == kind
    config.to_file(tmp_path / "again.yaml")
    assert FadeConfig.from_file(tmp_path / "again.yaml") == config


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kvzip"])  # test_attention_rereading.py has that
@pytest.mark.parametrize("axis", ["token", "channel"])
def test_generates_within_its_budget(kind: str, axis: str, seed: int, generator: torch.Generator) -> None:
    model = tiny_model(seed)
    ids, mask = left_padded((140, 90), generator)
    config = FadeConfig(
        n_sink=2,
        recent_window=16,
        tile=16,
        keys={"kind": "uniform", "axis": axis},
        policy={"kind": kind, "budget": 64, "every": 8},
    )
    with create_tiered_cache(model, config=config) as cache:
        output = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=40, min_new_tokens=40, do_sample=False
        )
        assert output.shape == (2, 180)
        cache.rank()
        for layer in cache.tiered:
            kept = (layer.held.tier_map() >= 0).sum(-1)
            a_head = kept.double().mean(1) if kind == "adakv" else kept
            assert float(a_head.max()) <= 64
            assert float(a_head.min()) > 64 - 16
            names = set(layer.tensors())
            for name in ("mass", "seen", "ema", "last", "window"):
                tracked = name in layer.plan.policy.statistics
                assert (f"fp16/statistic.{name}" in names) == tracked
            assert ("layer/queries.mean" in names) == ("query_mean" in layer.plan.policy.statistics)
            assert ("layer/queries.scatter" in names) == ("query_covariance" in layer.plan.policy.statistics)


def test_only_the_queries_that_a_policy_wants_are_observed(seed: int, generator: torch.Generator) -> None:
    model = tiny_model(seed)
    ids, mask = left_padded((100,), generator)
    for policy, window, observed in (
        ({"kind": "tova"}, 64, 1),
        ({"kind": "snapkv", "window": 9}, 64, 9),
        ({"kind": "normalised_h2o"}, 64, 100),
        ({"kind": "h2o"}, 7, 7),
        ({"kind": "expected_attention", "window": 33}, 64, 33),
    ):
        config = FadeConfig(policy={**policy, "budget": 80}, observation_window=window)
        with create_tiered_cache(model, config=config) as cache, torch.no_grad():
            model(ids, attention_mask=mask, past_key_values=cache)
            assert cache.tracker.observed(100) == observed


def test_a_saved_cache_goes_on_with_its_queries(seed: int, generator: torch.Generator, tmp_path: Path) -> None:
    model = tiny_model(seed)
    ids, mask = left_padded((90, 70), generator)
    config = FadeConfig(n_sink=2, recent_window=16, tile=16, policy={"kind": "expected_attention", "budget": 48})
    with create_tiered_cache(model, config=config) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.save(tmp_path / "cache.safetensors")
        before = cache.memory_report()
        with type(cache).load(tmp_path / "cache.safetensors", model) as again:
            assert again.memory_report().by("kind") == before.by("kind")
            for ours, theirs in zip(cache.tiered, again.tiered, strict=True):
                for name, tensor in ours.tensors().items():
                    if "queries" in name:
                        assert torch.equal(tensor, theirs.tensors()[name])
            cache.batch_select_indices(torch.tensor([1, 0, 1]))
            for ours, theirs in zip(cache.tiered, again.tiered, strict=True):
                mean = ours.tensors()["layer/queries.mean"]
                assert torch.equal(mean, theirs.tensors()["layer/queries.mean"][[1, 0, 1]])


def test_pooling_goes_by_position_not_by_slot() -> None:
    positions = torch.tensor([[[9, 3, -1, 4, 6]]])
    window = torch.tensor([[[1.0, 2.0, torch.nan, 4.0, 8.0]]])
    view = LayerView(positions, 10, statistics={"window": window})
    score = SnapKVPolicy(kernel=5).score(view)[0, 0] * 5
    assert score[[0, 1, 3, 4]].tolist() == [1.0, 2.0 + 4.0, 2.0 + 4.0 + 8.0, 4.0 + 8.0]
    score = SnapKVPolicy(kernel=3, pool="max").score(view)[0, 0]
    assert score[[0, 1, 3, 4]].tolist() == [1.0, 4.0, 4.0, 8.0]


def test_tova_averages_what_heads_give_to_one_position() -> None:
    positions = torch.tensor([[[5, 7, -1], [7, 8, 5]]])
    last = torch.tensor([[[0.5, 0.25, torch.nan], [0.75, 0.125, 0.0]]])
    score = get_policy("tova").score(LayerView(positions, 9, statistics={"last": last}))
    assert score[0, 0, :2].tolist() == [0.25, 0.5]
    assert score[0, 1].tolist() == [0.5, 0.0625, 0.25]


@pytest.mark.parametrize(
    ("kind", "fields", "fragment"),
    [
        ("snapkv", {"kernel": 4}, "kernel: an odd number"),
        ("snapkv", {"window": 0}, "window"),
        ("snapkv", {"pool": "min"}, "pool"),
        ("expected_attention", {"window": 1.5}, "window"),
        ("tova", {"window": 3}, "unknown field 'window'"),
    ],
)
def test_fields_that_cannot_work_are_refused(kind: str, fields: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        get_policy(kind, **fields)
    with pytest.raises(InputError, match="kernel=4 must be odd"):
        SnapKVPolicy(kernel=4)


def test_a_view_without_the_statistic_says_what_to_do() -> None:
    view = LayerView(torch.zeros(1, 1, 1, dtype=torch.long), 1, keys=lambda: torch.ones(1, 1, 1, 4))
    with pytest.raises(InputError, match="'query_mean' is not tracked here"):
        get_policy("expected_attention").score(view)
