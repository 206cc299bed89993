from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sealing import seal, unsealed
from transformers import LlamaForCausalLM

from fade_core import FadeConfig, create_tiered_cache
from fade_core.errors import CheckpointError
from fade_core.interfaces import LayerView
from fade_policy_learned import FEATURES, Geometry, LearnedPolicy, token_features, train_policy


@pytest.fixture
def policy(generator: torch.Generator) -> LearnedPolicy:
    features = torch.rand(200, len(FEATURES), generator=generator)
    return train_policy(features, features[:, 1] * 2 + features[:, 5], hidden=9, epochs=8).policy


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
    assert int(scores.argmax()) in positions.topk(3).indices
    assert torch.corrcoef(torch.stack([scores, positions.add(1).float()]))[0, 1] > 0.8


def test_a_file_gives_the_same_scores(policy: LearnedPolicy, view: LayerView, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    loaded = LearnedPolicy.load(str(path))
    assert torch.equal(loaded.score(view), policy.score(view))
    assert unsealed(path)[0] == {
        "kind": "fade-policy-learned",
        "format": 3,
        "features": list(FEATURES),
        "hidden": 9,
        "geometry": None,
        "notes": {},
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "fade-cache"}, "is not a learned policy; found 'fade-cache'"),
        ({"format": 2}, "has format 2, this version of FADE reads format 3"),
        ({"features": ["age"]}, r"trained on the features \['age'\]"),
        ({"hidden": "wide"}, "hidden: input should be a valid integer; found 'wide'"),
        ({"hidden": 10**9}, "hidden: input should be less than or equal to 65536"),
        ({"hidden": 65_536}, "its header asks for"),
        ({"hidden": True}, "hidden: true/false is not a value here"),
        ({"hidden": 10}, "its header asks for"),
        ({"geometry": [2, 0, 16]}, r"geometry.1: input should be greater than or equal to 1; found 0"),
        ({"geometry": [60_000, 60_000, 16]}, "its header asks for"),
        ({"notes": "made by"}, "notes: a table of fields is needed"),
        ({"more": 1}, "unknown field 'more'"),
    ],
)
def test_a_wrong_header_is_refused(policy: LearnedPolicy, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    header, state = unsealed(path)
    with pytest.raises(CheckpointError, match=message):
        LearnedPolicy.load(seal(path, header | change, state))


def test_a_file_of_the_versions_before_is_named_so(policy: LearnedPolicy, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    policy.save(path)
    header = {"format": "fade-policy-learned", "version": 2, **unsealed(path)[0], "hidden": 9}
    del header["kind"]
    save_file(load_file(path), path, metadata={"fade": json.dumps(header)})
    with pytest.raises(CheckpointError, match=r"has no checksum: an older version of FADE wrote it.*fade train-policy"):
        LearnedPolicy.load(path)


def test_other_files_are_refused(policy: LearnedPolicy, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no file"):
        LearnedPolicy.load(tmp_path / "nothing")
    text = tmp_path / "text.safetensors"
    text.write_text("not a checkpoint, only some text that is long enough")
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        LearnedPolicy.load(text)
    bare = tmp_path / "bare.safetensors"
    save_file({"x": torch.zeros(1)}, bare)
    with pytest.raises(CheckpointError, match="is a safetensors file, but not a learned policy"):
        LearnedPolicy.load(bare)
    policy.save(bare)
    content = bytearray(bare.read_bytes())
    content[-1] ^= 1
    bare.write_bytes(content)
    with pytest.raises(CheckpointError, match="its checksum is not that of what it holds"):
        LearnedPolicy.load(bare)


def test_broken_weights_are_refused(policy: LearnedPolicy, tmp_path: Path) -> None:
    path = tmp_path / "policy.safetensors"
    policy.network.state_dict()["layers.2.weight"][0, 0] = torch.nan
    policy.save(path)
    with pytest.raises(CheckpointError, match=r"NaN or infinity in layers\.2\.weight"):
        LearnedPolicy.load(path)


SHAPE = Geometry(6, 2, 5)


@pytest.fixture
def own(generator: torch.Generator) -> LearnedPolicy:
    """A policy whose heads have terms of their own."""
    features = torch.rand(600, len(FEATURES), generator=generator)
    return train_policy(features, features[:, 0] + features[:, -1], geometry=SHAPE, epochs=2).policy


def test_heads_have_terms_of_their_own(own: LearnedPolicy, view: LayerView, tmp_path: Path) -> None:
    own.notes = {"model": "tiny"}
    own.save(tmp_path / "own.safetensors")
    loaded = LearnedPolicy.load(tmp_path / "own.safetensors", "equal")
    assert (loaded.geometry, loaded.notes, loaded.heads) == (SHAPE, {"model": "tiny"}, "equal")
    before = own.score(view)
    assert torch.equal(loaded.score(view), before)
    own.network.own.weight[2 * 2 + 1, -1] += 3  # layer 2, head 1: what the view shows
    after = own.score(view)
    assert torch.equal(after[:, 0], before[:, 0])
    live = view.valid[:, 1]
    torch.testing.assert_close(after[:, 1][live], before[:, 1][live] + 3)


def test_heads_share_a_budget_or_have_equal_ones(own: LearnedPolicy, view: LayerView) -> None:
    scores = torch.tensor([[[9.0, 8, 7, 6, 5, -torch.inf], [4.0, 3, 2, 1, 0, -1]]])
    assert own.allocate(view, scores, torch.tensor([3])).tolist() == [[5, 1]]
    assert own.allocate(view, scores, torch.tensor([5])).tolist() == [[5, 5]]
    low = scores - torch.tensor([0.0, 100]).view(1, 2, 1)
    assert own.allocate(view, low, torch.tensor([5])).tolist() == [[5, 5]]
    assert own.allocate(view, torch.cat([low, low], -1), torch.tensor([5])).tolist() == [[8, 2]]  # the floor
    own.heads = "equal"
    assert own.allocate(view, scores, torch.tensor([3])) is None


def test_another_shape_is_refused_when_a_cache_is_made(
    own: LearnedPolicy, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    own.notes = {"model": "tiny"}
    own.save(tmp_path / "own.safetensors")
    for checkpoint, trained in (
        (str(tmp_path / "own.safetensors"), r"tiny \(6 layers, 2 KV heads of 5 channels\)"),
        ("smollm2", r"30 layers, 3 KV heads of 64 channels"),
    ):
        config = FadeConfig(policy={"kind": "learned", "checkpoint": checkpoint, "budget": 0.5})
        with pytest.raises(CheckpointError, match=trained + r".*2 layers, 2 KV heads of 16.*fade train-policy"):
            create_tiered_cache(model, config)


def test_the_shipped_policy_says_how_it_was_made() -> None:
    policy = LearnedPolicy.load("smollm2")
    assert policy.geometry == Geometry(30, 3, 64)
    assert policy.notes["tokens"] == 14 * 1024
    assert len(policy.notes["texts"]) == 14
    assert all(name.startswith("calibration-") for name in policy.notes["texts"])
    assert policy.notes["options"]["seed"] == 0
    assert "/" not in json.dumps(policy.notes)
