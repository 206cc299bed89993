from __future__ import annotations

from typing import Any

import pytest
import torch

from fade_core.errors import InputError
from fade_policy_learned import FEATURES, TrainingResult, train_policy

F = len(FEATURES)


def worth(features: torch.Tensor) -> torch.Tensor:
    """A target that no linear function of the features can give."""
    return 40 + 7 * (features[:, 0] * features[:, 3]).tanh() + 3 * (features[:, 1] - 0.5).abs()


def test_learns_what_a_line_cannot(generator: torch.Generator, seed: int) -> None:
    features = torch.randn(6_000, F, generator=generator) * 3 + 5
    standard = (features - 5) / 3
    targets = worth(standard)
    result = train_policy(features, targets, epochs=40, seed=seed)
    assert result.train_tokens == 4_800
    assert result.held_out_tokens == 1_200
    solution = torch.linalg.lstsq(torch.cat([standard, torch.ones(6_000, 1)], 1), targets.unsqueeze(1)).solution
    line = torch.cat([standard, torch.ones(6_000, 1)], 1) @ solution
    line_r2 = float(1 - (line.squeeze(1) - targets).square().mean() / targets.var())
    assert line_r2 < 0.5 < 0.8 < result.held_out_r2
    assert result.held_out_rank_correlation > 0.85
    assert result.losses[-1] < result.losses[0] / 4


def test_noise_is_not_learnt(generator: torch.Generator, seed: int) -> None:
    result = train_policy(
        torch.randn(4_000, F, generator=generator), torch.randn(4_000, generator=generator), epochs=3, seed=seed
    )
    assert result.held_out_r2 < 0.05
    assert abs(result.held_out_rank_correlation) < 0.15


def test_the_same_seed_gives_the_same_policy(generator: torch.Generator, seed: int) -> None:
    features = torch.randn(300, F, generator=generator)
    runs = [train_policy(features, worth(features), epochs=2, seed=s) for s in (seed, seed, seed + 1)]
    weights = [r.policy.network.state_dict()["layers.0.weight"] for r in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_leaves_the_global_random_state_alone(generator: torch.Generator) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    features = torch.randn(64, F, generator=generator)
    _short(features, worth(features))
    assert torch.equal(torch.rand(3), expected)


def test_whole_groups_are_held_out(generator: torch.Generator, seed: int) -> None:
    sizes = [50, 70, 90, 110, 130]
    groups = torch.cat([torch.full((n,), 10 * i) for i, n in enumerate(sizes)])
    features = torch.randn(len(groups), F, generator=generator)
    result = train_policy(features, worth(features), groups=groups, held_out=0.4, epochs=1, seed=seed)
    pairs = {a + b for i, a in enumerate(sizes) for b in sizes[i + 1 :]}
    assert result.held_out_tokens in pairs
    assert result.train_tokens + result.held_out_tokens == len(groups)


def test_affine_targets_give_the_same_order(generator: torch.Generator, seed: int) -> None:
    features = torch.randn(400, F, generator=generator)
    runs = [train_policy(features, t, epochs=2, seed=seed) for t in (worth(features), worth(features) * 64 - 3)]
    scores = [r.policy.network(features) for r in runs]
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-3, atol=1e-3)


def test_a_constant_feature_is_harmless(generator: torch.Generator) -> None:
    features = torch.randn(200, F, generator=generator)
    features[:, 6] = 3.0
    result = _short(features, worth(features))
    assert torch.isfinite(result.policy.network(features)).all()


def _short(features: torch.Tensor, targets: torch.Tensor, **options: Any) -> TrainingResult:
    return train_policy(features, targets, epochs=1, **options)


@pytest.mark.parametrize(
    ("features", "targets", "options", "message"),
    [
        (torch.rand(9, 3), torch.rand(9), {}, r"\[N, 14\].*found \[9, 3\]"),
        (torch.rand(9, F), torch.rand(8), {}, r"targets must be \[9\]"),
        (torch.rand(9, F), torch.tensor([torch.nan] * 9), {}, "targets hold 9 values"),
        (torch.rand(3, F), torch.rand(3), {}, "too few"),
        (torch.rand(9, F), torch.ones(9), {}, "all training targets are equal"),
        (torch.rand(9, F), torch.rand(9), {"groups": torch.zeros(9, dtype=torch.int64)}, "second text"),
        (torch.rand(9, F), torch.rand(9), {"groups": torch.zeros(9)}, "groups must be integers"),
        (torch.rand(9, F), torch.rand(9), {"groups": torch.tensor([0] * 8 + [1])}, "at least two"),
        (torch.rand(9, F), torch.rand(9), {"held_out": 1.0}, "held_out must lie between"),
        (torch.rand(9, F), torch.rand(9), {"hidden": 0}, "hidden must be at least 1"),
        (torch.rand(9, F), torch.rand(9), {"learning_rate": 0.0}, "learning_rate must be positive"),
    ],
)
def test_bad_input_is_refused(
    features: torch.Tensor, targets: torch.Tensor, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        _short(features, targets, **options)


def test_rare_and_large_targets_are_expected_not_averaged_away(generator: torch.Generator, seed: int) -> None:
    """The score of the loss ``tweedie`` is the log of the expected target, whatever its distribution."""
    features = torch.randn(20_000, F, generator=generator)
    expected = (features[:, 2] - features[:, 4]).exp()
    targets = expected * torch.rand(20_000, generator=generator).log().neg() * 37  # exponential: most are small
    result = train_policy(features, targets, loss="tweedie", epochs=8, seed=seed)
    scores = result.policy.network(features)
    wanted = expected.log()
    offset = (wanted - scores).mean()
    assert float((scores + offset - wanted).abs().mean()) < 0.25
    assert 0 < result.held_out_r2 < 1
    assert int(result.held_out.sum()) == result.held_out_tokens == 4_000


def test_tweedie_refuses_logarithms(generator: torch.Generator) -> None:
    with pytest.raises(InputError, match="not negative"):
        _short(torch.rand(9, F), torch.rand(9) - 1, loss="tweedie")
    with pytest.raises(InputError, match="no loss is called 'huber'; there are squares, tweedie"):
        _short(torch.rand(9, F), torch.rand(9), loss="huber")
