"""The attention that queries like the latest ones would give (expected attention, arXiv 2510.00636).

Statistics: "query_mean" and "query_covariance" of the latest ``window`` queries; no attention probability is computed.
Cost: ``4 D + 4 D ** 2`` bytes a row, layer and query head, nothing a token; at every ranking keys and values are decoded
and ``T D ** 2`` multiplications are made a query head.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fade_core.interfaces import EvictionPolicy, LayerView, PolicyConfig


class ExpectedAttentionPolicy(EvictionPolicy):
    """A token is worth its expected attention under Gaussian queries, times the norm of its value.

    For a query ``q ~ N(m, S)`` the expected ``exp(q . k)`` is ``exp(m . k + k S k / 2)``; shares of that, averaged over
    the query heads of a KV head, are the expected attention. The paper fits the Gaussian before RoPE and turns it to the
    positions to come; here it is fitted after RoPE to the latest queries, whose positions are next to those: no
    knowledge of the model's embedding is needed, and what RoPE spreads is in the covariance. A model's soft cap is not
    taken into account.

    Args:
        window: latest queries that the Gaussian is fitted to.
        covariance: use ``S``; without it the expected attention is that of the mean query.
        values: weigh by the norm of the value.
    """

    kind: ClassVar[str] = "expected_attention"

    def __init__(self, window: int = 256, covariance: bool = True, values: bool = True) -> None:
        self.observes, self.values = window, values
        self.statistics = ("query_mean", "query_covariance") if covariance else ("query_mean",)

    def score(self, view: LayerView) -> Tensor:
        valid = view.valid
        keys = view.keys.masked_fill(~valid[..., None], 0)
        heads = keys.shape[1]
        means = view.query_mean.unflatten(1, (heads, -1))
        spreads = view.query_covariance.unflatten(1, (heads, -1)) if len(self.statistics) > 1 else None
        expected = torch.zeros_like(keys[..., 0])
        for member in range(means.shape[2]):  # one at a time: each needs as much memory as the keys
            logits = (keys @ means[:, :, member, :, None])[..., 0]
            if spreads is not None:
                logits = logits + ((keys @ spreads[:, :, member]) * keys).sum(-1) / 2
            expected += logits.masked_fill(~valid, -torch.inf).softmax(-1).nan_to_num(0)
        expected /= means.shape[2]
        return expected * torch.linalg.vector_norm(view.values, dim=-1) if self.values else expected


class ExpectedAttentionConfig(PolicyConfig):
    """``kind = "expected_attention"``: least expected attention first.

    Attributes:
        window: latest queries that stand for those to come.
        covariance: use their covariance beside their mean.
        values: weigh by the norm of the value.
    """

    kind: Literal["expected_attention"] = "expected_attention"
    window: Annotated[int, Field(strict=True, ge=1)] = 256
    covariance: bool = True
    values: bool = True

    def build(self) -> ExpectedAttentionPolicy:
        return ExpectedAttentionPolicy(self.window, self.covariance, self.values)
