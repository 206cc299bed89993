"""Ranking tokens: who is demoted or evicted first."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fade_core.errors import InputError
from fade_core.interfaces.component import ComponentConfig
from fade_core.support.validation import Budget, CheckedModel, Count

if TYPE_CHECKING:
    from collections.abc import Callable


class LayerView:
    """What a policy sees of one layer: every live token, sinks and window included.

    Attributes:
        positions: int64 ``[B, H_kv, T]``, logical position of each token; -1 where a row or head has fewer than ``T``.
        logical_length: tokens the model has seen.
        layer: layer index.
        num_layers: layers of the model.
        lengths: int64 ``[B]``, tokens each row has really seen (padding not counted).
    """

    def __init__(
        self,
        positions: Tensor,
        logical_length: int,
        layer: int = 0,
        num_layers: int = 1,
        statistics: Mapping[str, Tensor] | None = None,
        keys: Callable[[], Tensor] | None = None,
        values: Callable[[], Tensor] | None = None,
        lengths: Tensor | None = None,
        queries: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.positions = positions
        self.logical_length = logical_length
        self.layer = layer
        self.num_layers = num_layers
        self.lengths = lengths if lengths is not None else torch.full((positions.shape[0],), logical_length)
        self._statistics = dict(statistics or {})
        self._queries = dict(queries or {})
        self._keys, self._values = keys, values
        self._decoded: dict[str, Tensor] = {}

    @property
    def valid(self) -> Tensor:
        """bool ``[B, H_kv, T]``: whether there is a token."""
        return self.positions >= 0

    @property
    def keys(self) -> Tensor:
        """Keys ``[B, H_kv, T, D]`` in float32, decoded on first use."""
        return self._decode("keys", self._keys)

    @property
    def values(self) -> Tensor:
        """Values ``[B, H_kv, T, D]`` in float32, decoded on first use."""
        return self._decode("values", self._values)

    def statistic(self, name: str) -> Tensor:
        """Tracked statistic ``[B, H_kv, T]``, float32. Raises ``InputError`` for one that is not tracked."""
        return self._tracked(name, self._statistics)

    @property
    def query_mean(self) -> Tensor:
        """Mean ``[B, H_q, D]`` of the latest queries, as the keys meet them: after RoPE, times the softmax scale.

        Float32; tracked if the policy names "query_mean" in its ``statistics``, else ``InputError``.
        """
        return self._tracked("query_mean", self._queries)

    @property
    def query_covariance(self) -> Tensor:
        """Covariance ``[B, H_q, D, D]`` of the same queries; tracked under the name "query_covariance"."""
        return self._tracked("query_covariance", self._queries)

    def _tracked(self, name: str, among: Mapping[str, Tensor]) -> Tensor:
        if name not in among:
            known = sorted({*self._statistics, *self._queries})
            raise InputError(
                f"statistic {name!r} is not tracked here (tracked: {known or 'none'}); "
                f"name it in the policy's `statistics`"
            )
        return among[name]

    def _decode(self, name: str, source: Callable[[], Tensor] | None) -> Tensor:
        if name not in self._decoded:
            if source is None:
                raise InputError(f"this view carries no {name}")
            self._decoded[name] = source()
        return self._decoded[name]


class EvictionPolicy(ABC):
    """Ranks tokens; the core owns sinks, window, budgets and top-k.

    Attributes:
        kind: the name it is chosen by.
        statistics: names of the tracked statistics that ``score`` reads, and the only ones that are kept. A token's: "mass"
            (accumulated attention), "ema" (decayed attention), "seen" (queries that could attend to the token), "last"
            (attention of the newest query), "window" (attention of the latest queries: those of the observation window
            at the end of a prompt, a leaky sum of that length after it), "reread" (the most that one query gave while the
            cache was only read, ``TieredKVCache.reading``; 0 for tokens that came later). A layer's: "query_mean" and
            "query_covariance".
        observes: queries at the end of a prompt that the statistics see, or "all"; ``None`` leaves it to the
            configuration's ``observation_window``.
        decay: what "ema" is multiplied by at each query.
        positional: the score grows with the position alone; the cache then moves whole tiles by age and stores no
            positions.
        rowwise: the score of a row is worked out from its positions, its statistics and the lengths alone, not from keys,
            values, queries or the layer's number; all layers are then shown in one view, as more rows, and scored by one call.
    """

    kind: ClassVar[str] = ""
    statistics: tuple[str, ...] = ()
    observes: int | Literal["all"] | None = None
    decay: float = 0.99
    positional: bool = False
    rowwise: bool = False

    @abstractmethod
    def score(self, view: LayerView) -> Tensor:
        """Worth of each token, ``[B, H_kv, T]`` float; the lowest are demoted or evicted first."""

    def prefill(
        self,
        model: Any,
        cache: Any,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        chunk: int | None = None,
        **options: Any,
    ) -> Any:
        """Feed a prompt to an empty cache; a policy that has to see more of it than one pass shows overrides this.

        Called by ``TieredKVCache.prefill``, whose ``holding`` and ``reading`` are made for it.

        Args:
            model: the model that the cache was made for.
            cache: the ``TieredKVCache``.
            input_ids: int64 ``[B, T]``.
            attention_mask: int ``[B, T]``, 0 for padding on the left; ``None`` for none.
            chunk: tokens a forward pass; ``None`` for all at once.
            options: further arguments of the model, such as ``logits_to_keep``.

        Returns:
            the model's output for the last tokens that were fed.
        """
        output, width = None, chunk or input_ids.shape[1]
        for start in range(0, input_ids.shape[1], width):
            part = slice(start, start + width)
            if attention_mask is not None:
                mask = attention_mask[:, : part.stop]
                places = (mask.cumsum(1) - 1).clamp_min(0)[:, start:]
                options |= {"attention_mask": mask, "position_ids": places}
            output = model(input_ids=input_ids[:, part], past_key_values=cache, use_cache=True, **options)
        return output

    def allocate(self, view: LayerView, scores: Tensor, budget: Tensor) -> Tensor | None:
        """How many packed tokens each head may keep; ``None`` (the default) for ``budget`` in every one.

        Asked only where there is a budget and more tokens than that. The core rounds to whole tiles. Tiers of the ladder
        are dealt out in proportion.

        Args:
            view: every live token.
            scores: what ``score`` gave, ``[B, H_kv, T]``; ``-inf`` for tokens that stay anyway (sinks, window) and for
                empty slots.
            budget: packed tokens a head on average, int64 ``[B]``.

        Returns:
            int64 ``[B, H_kv]``, at most ``H_kv * budget`` in each row.
        """
        return None


class PyramidSchedule(CheckedModel):
    """Budgets that fall linearly from the first layer to the last, their mean kept (PyramidKV, arXiv 2406.02069).

    Attributes:
        kind: "pyramid".
        ratio: the first layer's budget over the last one's, at least 1.
    """

    kind: Literal["pyramid"] = "pyramid"
    ratio: Annotated[float, Field(ge=1)] = 3.0

    def weights(self, layers: int) -> list[float]:
        """What each of ``layers`` has of the mean budget."""
        last = 2 / (1 + self.ratio)
        depth = max(layers - 1, 1)
        return [last * (self.ratio + (1 - self.ratio) * i / depth) if layers > 1 else 1.0 for i in range(layers)]


class PolicyConfig(ComponentConfig):
    """Configuration of an eviction policy.

    Attributes:
        kind: literal name.
        budget: tokens kept a row and head, sinks and window included: a count, a fraction of the context, or ``None``
            to evict nothing. Or what the whole cache may hold, such as "512MiB".
        every: decode steps between two rankings.
        schedule: how layers share the budget; ``None`` for equally.
    """

    kind: str
    budget: Budget | None = None
    every: Count = 64
    schedule: PyramidSchedule | None = None

    def build(self) -> EvictionPolicy:
        """The policy object."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")

    def check_model(self, model: Any) -> None:
        """Refuse a model that this was not made for; called once when a cache is created.

        Raises:
            CheckpointError: a file that belongs to another model.
            ConfigError: a model that this cannot work on.
        """
        return
