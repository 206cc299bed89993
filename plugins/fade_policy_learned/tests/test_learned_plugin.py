from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch

from fade_core import FadeConfig, get_policy
from fade_core.errors import CheckpointError, ConfigError
from fade_core.testing import check_component
from fade_policy_learned import FEATURES, LearnedPolicy, train_policy
from fade_policy_learned.plugin import LearnedConfig


@pytest.fixture
def checkpoint(generator: torch.Generator, tmp_path: Path) -> Path:
    features = torch.rand(80, len(FEATURES), generator=generator)
    path = tmp_path / "policy.safetensors"
    train_policy(features, features[:, 0], epochs=1).policy.save(path)
    return path


def test_the_entry_point_leads_here() -> None:
    (point,) = entry_points(group="fade", name="policy_learned")
    assert point.load().fade_policies() == [LearnedConfig]


def test_a_configuration_file_builds_it(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "fade.toml"
    file.write_text(f'[policy]\nkind = "learned"\nbudget = 0.5\ncheckpoint = "{checkpoint.as_posix()}"\n')
    config = FadeConfig.from_file(file)
    assert isinstance(config.policy.build(), LearnedPolicy)
    config.to_file(tmp_path / "again.toml")
    assert FadeConfig.from_file(tmp_path / "again.toml") == config


def test_by_name(checkpoint: Path) -> None:
    assert isinstance(get_policy("learned", checkpoint=str(checkpoint)), LearnedPolicy)


def test_passes_the_conformance_kit(checkpoint: Path, seed: int) -> None:
    report = check_component("policies:learned", fields={"checkpoint": str(checkpoint)}, seed=seed)
    assert report.ok, report


def test_what_is_shipped_passes_the_conformance_kit(seed: int) -> None:
    report = check_component("policies:learned", seed=seed)
    assert report.ok, report


def test_a_missing_checkpoint_is_named() -> None:
    with pytest.raises(
        CheckpointError,
        match=r"there is no file nowhere\.safetensors; 'fade train-policy' writes one, and smollm2 is shipped",
    ):
        LearnedConfig(checkpoint="nowhere.safetensors").build()
    with pytest.raises(ConfigError, match="heads"):
        LearnedConfig(heads="some")  # type: ignore[arg-type]
