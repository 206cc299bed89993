"""Short keys are attended to (key norm, arXiv 2406.11430).

Statistics: none.
Cost: keys are decoded at every ranking.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig


class KeyNormPolicy(EvictionPolicy):
    """A token is worth the more, the shorter its key."""

    kind: ClassVar[str] = "key_norm"

    def score(self, view: LayerView) -> Tensor:
        norms: Tensor = view.keys.norm(dim=-1)
        return -norms


class KeyNormConfig(PolicyConfig):
    """``kind = "key_norm"``: longest key first."""

    kind: Literal["key_norm"] = "key_norm"

    def build(self) -> KeyNormPolicy:
        return KeyNormPolicy()
