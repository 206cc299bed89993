"""The policy: a trained network behind ``EvictionPolicy.score``, kept in a safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fade_core.errors import CheckpointError
from fade_core.interfaces import EvictionPolicy, LayerView
from fade_policy_learned.features import FEATURES, STATISTICS, token_features
from fade_policy_learned.network import ScoreNetwork

FORMAT = "fade-policy-learned"
VERSION = 1


class LearnedPolicy(EvictionPolicy):
    """A token is worth what a network trained on attention traces predicts.

    Args:
        network: maps features ``[..., len(FEATURES)]`` to scores; ``train_policy`` returns one inside a policy.
    """

    kind: ClassVar[str] = "learned"
    statistics: tuple[str, ...] = STATISTICS

    def __init__(self, network: ScoreNetwork) -> None:
        self.network = network.eval().requires_grad_(False)

    def score(self, view: LayerView) -> Tensor:
        """Predicted worth, float32 ``[B, H_kv, T]``."""
        features = token_features(view)
        scores: Tensor = self.network.to(features.device)(features)
        return scores

    def save(self, path: str | Path) -> None:
        """Write weights and a header (format, version, feature names, hidden width) to a safetensors file."""
        header = {
            "format": FORMAT,
            "version": str(VERSION),
            "features": json.dumps(FEATURES),
            "hidden": str(self.network.hidden),
        }
        save_file({k: v.cpu().contiguous() for k, v in self.network.state_dict().items()}, path, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> LearnedPolicy:
        """Read what ``save`` wrote.

        Raises:
            CheckpointError: no such file, not a safetensors file, another format, version or feature list, or
                weights that do not fit the header.
        """
        header, state = _read(Path(path))
        _check_header(path, header)
        network = ScoreNetwork(len(FEATURES), int(header["hidden"]))
        expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in state.items()}
        if found != expected:
            raise CheckpointError(f"{path} holds weights {found}; its header asks for {expected}")
        broken = sorted(name for name, t in state.items() if not torch.isfinite(t).all())
        if broken:
            raise CheckpointError(f"{path} holds NaN or infinity in {', '.join(broken)}; train the policy again")
        network.load_state_dict(state)
        return cls(network)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"no policy file at {path}; train_policy(...).policy.save(path) writes one")
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}); LearnedPolicy.save writes one") from error


def _check_header(path: str | Path, header: dict[str, str]) -> None:
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a learned policy: format {header.get('format')!r}, expected {FORMAT!r}")
    if header.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path} has version {header.get('version')!r} of the format, this plugin reads {VERSION}; train it again"
        )
    if header.get("features") != json.dumps(FEATURES):
        raise CheckpointError(
            f"{path} was trained on the features {header.get('features')}, this plugin computes {json.dumps(FEATURES)}"
        )
    hidden = header.get("hidden", "")
    if not hidden.isdecimal() or int(hidden) < 1:
        raise CheckpointError(f"{path} names the hidden width {hidden!r}; a positive number was expected")
