"""What the end of the prompt looks at, and its neighbours (SnapKV, arXiv 2404.14469).

Statistic: "window", the attention of the latest ``window`` queries.
Cost: 4 bytes a token and head; attention logits of ``window`` queries at prefill, of every query at decode.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field
from torch import Tensor

from fade_core.errors import InputError
from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig
from fade_policy_attention.slots import Pool, pooled


class SnapKVPolicy(EvictionPolicy):
    """A token is worth the attention that the latest queries give to it and to the tokens around it.

    The paper scores a prompt once; here the window moves on with decoding, so that later rankings look from where the
    text has come to.

    Args:
        window: latest queries that have a say.
        kernel: positions that are pooled around each token, odd; evicted ones count as unattended.
        pool: "mean" or "max".

    Raises:
        InputError: for an even kernel.
    """

    kind: ClassVar[str] = "snapkv"
    rowwise: bool = True
    statistics: tuple[str, ...] = ("window",)

    def __init__(self, window: int = 32, kernel: int = 5, pool: Pool = "mean") -> None:
        if kernel < 1 or kernel % 2 == 0:
            raise InputError(f"kernel={kernel} must be odd, so that it has a middle")
        self.observes, self.kernel, self.pool = window, kernel, pool

    def score(self, view: LayerView) -> Tensor:
        return pooled(view.statistic("window"), view.positions, self.kernel // 2, self.pool)


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError(f"an odd number of positions is needed, so that there is a middle; found {kernel}")
    return kernel


class SnapKVConfig(PolicyConfig):
    """``kind = "snapkv"``: least attended by the latest queries first, neighbours counted.

    Attributes:
        window: latest queries that have a say.
        kernel: positions pooled around each token, an odd number.
        pool: "mean" or "max".
    """

    kind: Literal["snapkv"] = "snapkv"
    window: Annotated[int, Field(strict=True, ge=1)] = 32
    kernel: Annotated[int, Field(strict=True, ge=1), AfterValidator(_odd)] = 5
    pool: Pool = "mean"

    def build(self) -> SnapKVPolicy:
        return SnapKVPolicy(self.window, self.kernel, self.pool)
