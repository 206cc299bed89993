"""The policy: a trained network behind ``EvictionPolicy.score``, kept in a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, JsonValue
from torch import Tensor

from fade_core import FileHeader, FileKind
from fade_core.errors import CheckpointError
from fade_core.interfaces import EvictionPolicy, LayerView
from fade_policy_learned.features import DECAY, FEATURES, STATISTICS, token_features
from fade_policy_learned.network import Geometry, ScoreNetwork

MOST = 65_536
"""Layers, heads, channels or hidden units that no model has."""

Size = Annotated[int, Field(strict=True, ge=1, le=MOST)]


class PolicyHeader(FileHeader):
    """What a policy file says of itself.

    Attributes:
        features: what the network sees of a token.
        hidden: its hidden width.
        geometry: layers, KV heads and head dimension of the model that it is for; ``None`` for any.
        notes: how it was made.
    """

    features: tuple[str, ...]
    hidden: Size
    geometry: tuple[Size, Size, Size] | None
    notes: dict[str, JsonValue]


DATA = Path(__file__).parent / "data"

SHIPPED = ("smollm2",)
"""Policies that come with this distribution, by name: SmolLM2-135M-Instruct, from the calibration texts of the core."""

POLICY_FILE = FileKind(
    "fade-policy-learned",
    3,
    "a learned policy",
    f"'fade train-policy' writes one, and {', '.join(SHIPPED)} is shipped",
    PolicyHeader,
)
"""Its format is raised when the meaning of a weight changes."""

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
        """Write weights and a header (features, hidden width, geometry, notes) to a safetensors file with a checksum.

        Raises:
            CheckpointError: if it cannot be written.
        """
        shape = self.geometry
        header = {
            "features": FEATURES,
            "hidden": self.network.hidden,
            "geometry": shape and (shape.layers, shape.heads, shape.head_dim),
            "notes": self.notes,
        }
        POLICY_FILE.write(path, header, {name: held.cpu() for name, held in self.network.state_dict().items()})

    @classmethod
    def load(cls, path: str | Path, heads: Heads = "shared") -> LearnedPolicy:
        """Read what ``save`` wrote, or the policy of ``SHIPPED`` that is called so.

        Raises:
            CheckpointError: no such file, damage anywhere, another kind, format or feature list, or weights that do not fit
                the header.
        """
        header, state = POLICY_FILE.read(DATA / f"{path}.safetensors" if str(path) in SHIPPED else path)
        if header.features != FEATURES:
            raise CheckpointError(
                f"{path} was trained on the features {list(header.features)}, this plugin computes {list(FEATURES)}"
            )
        shape = Geometry(*header.geometry) if header.geometry else None
        with torch.device("meta"):  # shapes alone: nothing is allocated that the file does not hold
            expected = _kinds(ScoreNetwork(len(FEATURES), header.hidden, shape).state_dict())
        if _kinds(state) != expected:
            raise CheckpointError(f"{path} holds weights {_kinds(state)}; its header asks for {expected}")
        broken = sorted(name for name, t in state.items() if not torch.isfinite(t).all())
        if broken:
            raise CheckpointError(f"{path} holds NaN or infinity in {', '.join(broken)}; train the policy again")
        network = ScoreNetwork(len(FEATURES), header.hidden, shape)
        network.load_state_dict(state)
        return cls(network, heads, header.notes)


def _kinds(state: Mapping[str, Tensor]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(held.shape), held.dtype) for name, held in state.items()}
