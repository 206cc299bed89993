from __future__ import annotations

import math

import pytest
import torch

from fade_core.errors import InputError
from fade_core.interfaces import LayerView
from fade_policy_learned import FEATURES, token_features


def column(view: LayerView, name: str) -> torch.Tensor:
    return token_features(view)[..., FEATURES.index(name)]


def test_shape_and_empty_slots(view: LayerView) -> None:
    features = token_features(view)
    assert features.shape == (*view.positions.shape, len(FEATURES))
    assert features.dtype == torch.float32
    assert torch.isfinite(features).all()
    assert (features[~view.valid] == 0).all()


def test_each_feature_against_its_definition(view: LayerView) -> None:
    b, h, t = 2, 1, 1
    position = int(view.positions[b, h, t])
    given = {name: view.statistic(name)[b, :, :] for name in ("mass", "seen", "ema", "last")}
    mass = {
        (head, int(p)): float(given["mass"][head, i] / given["seen"][head, i].clamp(min=1))
        for head in range(2)
        for i, p in enumerate(view.positions[b, head])
        if p >= 0
    }
    seen = max(float(given["seen"][h, t]), 1)

    def around(radius: int) -> float:
        found = [m for (head, p), m in mass.items() if head == h and abs(p - position) <= radius]
        return sum(found) / len(found)

    across = [m for (_, p), m in mass.items() if p == position]
    keys, values = view.keys[b, h, :3], view.values[b, h, :3]
    away = (values - values.mean(0)).norm(dim=-1)
    expected = {
        "log_mass": math.log(mass[h, position]),
        "log_ema": math.log(float(given["ema"][h, t]) * 0.01 / (1 - 0.99**seen)),
        "log_last": math.log(float(given["last"][h, t])),
        "log_recency": math.log(1 + 39 - position),
        "relative_position": position / 40,
        "key_norm": float(keys.norm(dim=-1)[t] / keys.norm(dim=-1).mean()),
        "value_norm": float(values.norm(dim=-1)[t] / values.norm(dim=-1).mean()),
        "log_near": math.log(around(2)),
        "log_around": math.log(around(8)),
        "log_heads": math.log(sum(across) / len(across)),
        "value_distance": float(away[t] / away.mean()),
        "key_likeness": float(torch.cosine_similarity(keys[t], keys.mean(0), dim=0)),
        "head": 1 / 2,
        "layer": 2 / 6,
    }
    assert list(expected) == list(FEATURES)
    for name, value in expected.items():
        assert float(column(view, name)[b, h, t]) == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_an_untracked_statistic_is_named(view: LayerView) -> None:
    bare = LayerView(view.positions, 40, statistics={"seen": torch.ones(view.positions.shape)})
    with pytest.raises(InputError, match="'mass' is not tracked"):
        token_features(bare)
