"""Evict the tokens whose keys are long: attention rarely goes there (key norm, arXiv 2406.11430)."""

from typing import Literal

from torch import Tensor

from fade_core import EvictionPolicy, LayerView, PolicyConfig, hookimpl


class KeyNorm(EvictionPolicy):
    """A token is worth the more, the shorter its key."""

    kind = "knorm"

    def score(self, view: LayerView) -> Tensor:
        return -view.keys.norm(dim=-1)


class KeyNormConfig(PolicyConfig):
    """``policy = {kind = "knorm", budget = 0.5}``; ``budget`` and ``every`` come from the base."""

    kind: Literal["knorm"] = "knorm"

    def build(self) -> KeyNorm:
        return KeyNorm()


@hookimpl
def fade_policies() -> list[type[PolicyConfig]]:
    return [KeyNormConfig]
