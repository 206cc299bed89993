from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fade_core.errors import CheckpointError
from fade_core.interfaces import LayerView
from fade_policy_learned import FEATURES, LearnedPolicy, token_features, train_policy


@pytest.fixture
def policy(generator: torch.Generator) -> LearnedPolicy:
    features = torch.rand(200, len(FEATURES), generator=generator)
    return train_policy(features, features[:, 1] * 2 + features[:, 3], hidden=9, epochs=8).policy


def test_scores_every_token(policy: LearnedPolicy, view: LayerView) -> None:
    scores = policy.score(view)
    assert scores.shape == view.positions.shape
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores, policy.network(token_features(view)))
    assert not scores.requires_grad


def test_a_trained_policy_ranks_by_what_it_learnt(generator: torch.Generator, view: LayerView) -> None:
    recency = FEATURES.index("log_recency")
    seen = token_features(view)[view.valid]
    features = seen[torch.randint(len(seen), (4_000,), generator=generator)]
    features = features + 0.1 * torch.randn(features.shape, generator=generator)
    features[:, recency] = torch.rand(4_000, generator=generator) * 4
    recent_first = train_policy(features, -features[:, recency], epochs=20).policy
    scores, positions = recent_first.score(view)[0, 0], view.positions[0, 0]
    assert int(scores.argmax()) == int(positions.argmax())
    assert torch.corrcoef(torch.stack([scores, positions.add(1).float()]))[0, 1] > 0.8


def test_a_file_gives_the_same_scores(policy: LearnedPolicy, view: LayerView, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    loaded = LearnedPolicy.load(str(path))
    assert torch.equal(loaded.score(view), policy.score(view))
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    assert header == {
        "format": "fade-policy-learned",
        "version": "1",
        "features": json.dumps(FEATURES),
        "hidden": "9",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "fade-cache"}, "is not a learned policy: format 'fade-cache'"),
        ({"version": "2"}, "version '2' of the format, this plugin reads 1"),
        ({"features": '["age"]'}, r'trained on the features \["age"\]'),
        ({"hidden": "wide"}, "hidden width 'wide'"),
        ({"hidden": "10"}, "its header asks for"),
    ],
)
def test_a_wrong_header_is_refused(policy: LearnedPolicy, tmp_path: Path, change: dict[str, str], message: str) -> None:
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    with safe_open(path, framework="pt") as file:
        header = file.metadata() | change
    save_file(load_file(path), path, metadata=header)
    with pytest.raises(CheckpointError, match=message):
        LearnedPolicy.load(path)


def test_other_files_are_refused(policy: LearnedPolicy, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no policy file at"):
        LearnedPolicy.load(tmp_path / "nothing")
    text = tmp_path / "text.safetensors"
    text.write_text("not a checkpoint, only some text that is long enough")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        LearnedPolicy.load(text)
    bare = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(1)}, bare)
    with pytest.raises(CheckpointError, match="format None"):
        LearnedPolicy.load(bare)


def test_broken_weights_are_refused(policy: LearnedPolicy, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    policy.network.state_dict()["layers.2.weight"][0, 0] = torch.nan
    policy.save(path)
    with pytest.raises(CheckpointError, match=r"NaN or infinity in layers\.2\.weight"):
        LearnedPolicy.load(path)
