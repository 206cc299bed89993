"""The policy: a trained network behind ``EvictionPolicy.score``, kept in a safetensors file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fade_core.errors import CheckpointError
from fade_core.interfaces import EvictionPolicy, LayerView
from fade_policy_learned.features import DECAY, FEATURES, STATISTICS, token_features
from fade_policy_learned.network import Geometry, ScoreNetwork

FORMAT = "fade-policy-learned"
VERSION = 2

DATA = Path(__file__).parent / "data"

SHIPPED = ("smollm2",)
"""Policies that come with this distribution, by name: SmolLM2-135M-Instruct, from the calibration texts of the core."""

Heads = Literal["shared", "equal"]
"""``shared``: the heads of a layer compete for one budget (AdaKV, arXiv 2407.11550); ``equal``: each has the same."""

FLOOR = 0.5
"""Share of an equal split that every head keeps whatever the others have. The cache rounds to tiles: less would leave heads
nothing where budgets are small."""


class LearnedPolicy(EvictionPolicy):
    """A token is worth what a network trained on attention traces predicts.

    Args:
        network: maps features ``[..., len(FEATURES)]`` to scores; ``train_policy`` returns one inside a policy.
        heads: how the heads of a layer share its budget.
        notes: how the policy was made; saved with it.
    """

    kind: ClassVar[str] = "learned"
    statistics: tuple[str, ...] = STATISTICS
    observes: int | Literal["all"] | None = "all"
    decay: float = DECAY

    def __init__(self, network: ScoreNetwork, heads: Heads = "shared", notes: Mapping[str, Any] | None = None) -> None:
        self.network = network.eval().requires_grad_(False)
        self.heads, self.notes = heads, dict(notes or {})

    @property
    def geometry(self) -> Geometry | None:
        """Shape of the models that the policy is for; ``None`` for any."""
        return self.network.geometry

    def score(self, view: LayerView) -> Tensor:
        """Predicted worth, float32 ``[B, H_kv, T]``; of all heads on one scale."""
        features = token_features(view)
        scores: Tensor = self.network.to(features.device)(features)
        return scores

    def allocate(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor | None:
        """With ``heads = "shared"`` the best ``H_kv * budget`` tokens of each row, once each head's floor is served."""
        if self.heads == "equal":
            return None
        live = scores > -torch.inf
        sure = torch.minimum((budget * FLOOR).long()[:, None], live.sum(-1))
        rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        first = scores.masked_fill(rank < sure[..., None], torch.inf).flatten(1)
        place = first.argsort(dim=-1, descending=True, stable=True).argsort(-1).view(scores.shape)
        counts: Tensor = ((place < (budget * scores.shape[1])[:, None, None]) & live).sum(-1)
        return counts

    def check_model(self, model: Any) -> None:
        """Raises ``CheckpointError`` if the policy was trained on a model of another shape than ``model``'s."""
        if self.geometry is None:
            return
        config = model.config.get_text_config(decoder=True)
        found = set()
        for layer in getattr(config, "per_layer_config", None) or [config]:
            heads = getattr(layer, "num_key_value_heads", None) or layer.num_attention_heads
            dim = getattr(layer, "head_dim", None) or config.hidden_size // layer.num_attention_heads
            found.add(Geometry(config.num_hidden_layers, heads, dim))
        if found != {self.geometry}:
            shapes = " and ".join(sorted(map(str, found)))
            raise CheckpointError(
                f"the learned policy was trained on {self.notes.get('model', 'a model')} ({self.geometry}); "
                f"{type(model).__name__} has {shapes}. Train one for it with 'fade train-policy' and name the file"
            )

    def save(self, path: str | Path) -> None:
        """Write weights and a header (format, version, features, hidden width, geometry, notes) to a safetensors file."""
        shape = self.geometry
        header = {
            "format": FORMAT,
            "version": VERSION,
            "features": FEATURES,
            "hidden": self.network.hidden,
            "geometry": shape and [shape.layers, shape.heads, shape.head_dim],
            "notes": self.notes,
        }
        state = {k: v.cpu().contiguous() for k, v in self.network.state_dict().items()}
        save_file(state, path, metadata={"fade": json.dumps(header)})  # one entry: several are written in any order

    @classmethod
    def load(cls, path: str | Path, heads: Heads = "shared") -> LearnedPolicy:
        """Read what ``save`` wrote, or the policy of ``SHIPPED`` that is called so.

        Raises:
            CheckpointError: no such file, not a safetensors file, another format, version or feature list, or
                weights that do not fit the header.
        """
        header, state = _read(DATA / f"{path}.safetensors" if str(path) in SHIPPED else Path(path))
        _check_header(path, header)
        network = ScoreNetwork(len(FEATURES), header["hidden"], _geometry(path, header["geometry"]))
        expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in state.items()}
        if found != expected:
            raise CheckpointError(f"{path} holds weights {found}; its header asks for {expected}")
        broken = sorted(name for name, t in state.items() if not torch.isfinite(t).all())
        if broken:
            raise CheckpointError(f"{path} holds NaN or infinity in {', '.join(broken)}; train the policy again")
        network.load_state_dict(state)
        return cls(network, heads, header["notes"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not path.is_file():
        raise CheckpointError(
            f"no policy file at {path}; 'fade train-policy' writes one, and {', '.join(SHIPPED)} is shipped"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(metadata["fade"]) if "fade" in metadata else metadata
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file ({error}); LearnedPolicy.save writes one") from error
    return dict(header), state


def _check_header(path: str | Path, header: dict[str, Any]) -> None:
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a learned policy: format {header.get('format')!r}, expected {FORMAT!r}")
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has version {header.get('version')!r} of the format, this plugin reads {VERSION}; train it again"
        )
    if header.get("features") != list(FEATURES):
        raise CheckpointError(
            f"{path} was trained on the features {header.get('features')}, this plugin computes {list(FEATURES)}"
        )
    hidden = header.get("hidden")
    if type(hidden) is not int or hidden < 1:
        raise CheckpointError(f"{path} names the hidden width {hidden!r}; a positive number was expected")
    if not isinstance(header.get("notes"), dict) or "geometry" not in header:
        raise CheckpointError(f"{path} lacks its notes or its geometry; train the policy again")


def _geometry(path: str | Path, found: Any) -> Geometry | None:
    if found is None:
        return None
    if not (isinstance(found, list) and len(found) == 3 and all(type(n) is int and n > 0 for n in found)):
        raise CheckpointError(f"{path} names the geometry {found!r}; layers, KV heads and head_dim were expected")
    return Geometry(*found)
