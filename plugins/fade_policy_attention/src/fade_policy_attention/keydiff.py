"""Keys unlike the others are worth keeping (KeyDiff, arXiv 2504.15364).

Statistics: none.
Cost: keys are decoded at every ranking.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor
from torch.nn.functional import normalize

from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig


class KeyDiffPolicy(EvictionPolicy):
    """A token is worth how far its key points away from the mean direction of all keys of the head."""

    kind: ClassVar[str] = "keydiff"

    def score(self, view: LayerView) -> Tensor:
        directions = normalize(view.keys.masked_fill(~view.valid[..., None], 0), dim=-1)
        anchor = normalize(directions.sum(2, keepdim=True), dim=-1)  # as the mean, whose length does not matter
        return -(directions * anchor).sum(-1)


class KeyDiffConfig(PolicyConfig):
    """``kind = "keydiff"``: keys most like the mean first."""

    kind: Literal["keydiff"] = "keydiff"

    def build(self) -> KeyDiffPolicy:
        return KeyDiffPolicy()
