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
    mass, seen = float(view.statistic("mass")[b, h, t]), float(view.statistic("seen")[b, h, t])
    keys = view.keys[b, h, :3].norm(dim=-1)
    expected = {
        "log_mass": math.log(mass / max(seen, 1)),
        "log_recency": math.log(1 + 39 - position),
        "relative_position": position / 40,
        "key_norm": float(keys[t] / keys.mean()),
        "value_norm": float(view.values[b, h, t].norm() / view.values[b, h, :3].norm(dim=-1).mean()),
        "head": 1 / 2,
        "layer": 2 / 6,
    }
    assert list(expected) == list(FEATURES)
    for name, value in expected.items():
        assert float(column(view, name)[b, h, t]) == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_an_untracked_statistic_is_named(view: LayerView) -> None:
    bare = LayerView(view.positions, 40, statistics={"seen": torch.ones(view.positions.shape)})
    with pytest.raises(InputError, match="'mass' is not tracked"):
        token_features(bare)
