"""Turning full-precision tokens into packed ones and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from fade_core.errors import CheckpointError, InputError
from fade_core.interfaces.component import ComponentConfig
from fade_core.interfaces.layouts import PlainEncoding, PlaneLayout, RunLayout
from fade_core.interfaces.rope import RopeScheme
from fade_core.packed import Packed, PackedFormat
from fade_core.support.validation import Count

if TYPE_CHECKING:
    from collections.abc import Callable

Side = Literal["key", "value"]


@dataclass(frozen=True)
class PromptView:
    """A layer's attention over a prompt, in full precision: what a quantizer may learn from before it encodes.

    It holds the newest ``Q`` tokens' queries and all ``T >= Q`` tokens so far; query ``i`` belongs to token
    ``T - Q + i``. Nothing of it may be changed or kept.

    Attributes:
        queries: ``[B, H_q, Q, D]``, positions applied, not scaled.
        keys: ``[B, H_kv, T, D]``, positions applied.
        values: ``[B, H_kv, T, E]``.
        scaling: factor of the logits.
        softcap: soft cap of the logits, if the model has one.
        sink_logits: attention-sink logits ``[H_q]``, if the model has them.
        visible: bool ``[B or 1, H_kv or 1, q, T]`` of what some queries may see, given a slice or int64 ``[q]`` of them;
            padding is seen by no real token.
        module: the model's attention module (its output projection says how far an error of a value goes).
        layer: layer index.
        n_sink: leading tokens of a row that stay in full precision.
        recent_window: newest tokens that do.
        rope: how the layer's keys and queries carry their positions; ``None`` where that is not known, or changes with the
            length.
        causal: whether queries see all tokens up to their own, for sure, and none after it.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float
    softcap: float | None
    sink_logits: Tensor | None
    visible: Callable[[slice | Tensor], Tensor]
    module: torch.nn.Module
    layer: int = 0
    n_sink: int = 0
    recent_window: int = 0
    rope: RopeScheme | None = None
    causal: bool = False
    _found: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, computed by the first who asks: keys' and values' quantizers can share it."""
        if name not in self._found:
            self._found[name] = compute()
        return self._found[name]


class Quantizer(ABC):
    """Turns full-precision tokens into packed ones and back.

    A quantizer belongs to one layer and one side (keys or values). Attention never needs ``decode``: it asks for
    ``scores`` and ``combine``, which a quantizer may answer without reconstructing a token. Where the packed part is
    a ``PackedFormat``, ``format`` says which, and a kernel reads the words itself after ``transform_query`` and before
    ``transform_output``; ``planes`` tells of channels of several widths.

    Attributes:
        kind: the name it is chosen by.
        head_dim: channels ``D``.
        tile: tokens encoded together; the cache only ever encodes whole tiles.
        format: the packed format that kernels see, or ``None`` if only this class can read its fields.
        moves_tokens: whether ``select`` works: single tokens can be regrouped without touching their codes.
        heads_together: whether the fields of tile ``n`` hold the codes of all heads of a row between them, so that each head
            needs the others' to be read. The cache keeps tile ``n`` of every head as long as one has tokens in it.
        learns: whether ``observe`` is wanted. ``field_shapes`` must not depend on what was learnt.
        shortcoming: why it encodes worse than it was meant to, if it does; told in a "fallback" event.
    """

    kind: ClassVar[str] = ""
    heads_together: ClassVar[bool] = False
    learns: ClassVar[bool] = False
    shortcoming: str = ""
    head_dim: int
    tile: int = 64
    format: PackedFormat | None = None
    moves_tokens: bool = False

    @property
    @abstractmethod
    def bits_per_element(self) -> float:
        """Bits an element of a whole tile takes, all metadata counted."""

    @abstractmethod
    def field_shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape (of one tile) and dtype of every stored field."""

    @abstractmethod
    def encode(self, x: Tensor) -> Packed:
        """Encode ``[B, H_kv, T, D]``; ``T`` need not fill the last tile. Raises ``InputError`` on a wrong shape."""

    @abstractmethod
    def decode(self, packed: Packed) -> Tensor:
        """Reconstruct ``[B, H_kv, T, D]`` in ``packed.dtype``."""

    def nbytes(self, packed: Packed) -> int:
        """Bytes that ``packed`` holds."""
        return packed.nbytes

    # attention in packed space
    def scores(self, query: Tensor, packed: Packed) -> Tensor:
        """Inner products ``[B, H_kv, N, T]`` of float32 queries ``[B, H_kv, N, D]`` with the packed keys."""
        return query @ self.decode(packed).to(query.dtype).transpose(-1, -2)

    def combine(self, weights: Tensor, packed: Packed) -> Tensor:
        """Weighted sums ``[B, H_kv, N, D]`` of the packed values under float32 ``[B, H_kv, N, T]``."""
        return weights @ self.decode(packed).to(weights.dtype)

    def select(self, packed: Packed, index: Tensor) -> Packed:
        """The tokens ``index`` (int64 ``[B, H_kv, K]``, ``K`` a multiple of ``tile``), codes untouched, repacked."""
        raise InputError(f"quantizer {self.kind!r} cannot move single tokens; it moves whole tiles")

    # what a kernel does around the packed format
    def plain_encoding(self, device: torch.device) -> PlainEncoding | None:
        """What ``encode`` does on ``device``, if a kernel can do the same; ``None`` (the default) if only this class can."""
        return None

    def planes(self) -> PlaneLayout | None:
        """Where a kernel finds the codes if there is no ``format``; ``None`` (the default) if only this class reads them.

        For quantizers that code ``heads_together``. The same object for as long as what it says holds: kernels keep what they
        derive from it.
        """
        return None

    def runs(self) -> RunLayout | None:
        """Where a kernel that looks levels up finds codes of many widths, as ``planes`` for one that does not."""
        return None

    @property
    def own_space(self) -> bool:
        """Whether queries and outputs have to be taken to the space of the codes and back, by the three methods below."""
        own = type(self)
        return (
            own.transform_query is not Quantizer.transform_query
            or own.query_bias is not Quantizer.query_bias
            or own.transform_output is not Quantizer.transform_output
        )

    def transform_query(self, query: Tensor) -> Tensor:
        """The query ``[B, H_kv, N, D]`` in the space of the codes (identity unless rotated)."""
        return query

    def query_bias(self, query: Tensor) -> Tensor | None:
        """A constant ``[B, H_kv, N, 1]`` added to every score of this tier (keys stored about a mean), or ``None``."""
        return None

    def transform_output(self, output: Tensor, weight_sum: Tensor) -> Tensor:
        """Take ``[B, H_kv, N, D]``, a sum of codes-space values, back; ``weight_sum`` ``[B, H_kv, N, 1]`` carries a mean."""
        return output

    # learning from the prompt
    def observe(self, prompt: PromptView) -> None:  # noqa: B027 (most learn nothing)
        """Learn from a prompt; called before the first token is encoded, again for each chunk until then.

        On a GPU the layer's attention is enqueued right after: what waits for the device is best left until it is needed.
        """

    def forget(self) -> None:  # noqa: B027
        """The layer begins again with an empty cache: what was learnt from the tokens before may be another text's."""

    # state: rotations, codebooks, calibration
    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that decoding needs beside the packed fields (rotation, codebook); saved in checkpoints."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` gave. Raises ``CheckpointError`` if it does not fit."""
        if state:
            raise CheckpointError(f"quantizer {self.kind!r} keeps no state; found {sorted(state)}")

    def state_bytes(self) -> int:
        """Bytes of ``state_dict``: counted by the memory report."""
        return sum(t.numel() * t.element_size() for t in self.state_dict().values())


@dataclass(frozen=True)
class QuantizerContext:
    """Where a quantizer will be used; passed to ``QuantizerConfig.build``."""

    head_dim: int
    side: Side = "key"
    tile: int = 64
    layer: int = 0
    num_layers: int = 1
    num_kv_heads: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


class QuantizerConfig(ComponentConfig):
    """Configuration of a quantizer. Subclasses set ``kind: Literal["name"] = "name"`` and ``build``."""

    kind: str
    bits: Count = 4

    def build(self, context: QuantizerContext) -> Quantizer:
        """The quantizer for one layer and side. Raises ``ConfigError`` if it cannot work there."""
        raise NotImplementedError(f"{type(self).__name__} must define build(context)")

    def check_model(self, model: Any) -> None:
        """Refuse a model (a ``torch.nn.Module``) that this was not made for; called once when a cache is created.

        Its weights may be unreadable (on the meta device, offloaded, packed): then there is nothing to refuse.

        Raises:
            CheckpointError: a file that belongs to another model.
            ConfigError: a model that this cannot work on.
        """
        return

    def with_bits(self, bits: int) -> QuantizerConfig:
        """The same quantizer at another width (what ladder tiers ask for)."""
        return type(self).model_validate({**self.model_dump(exclude_unset=True), "kind": self.kind, "bits": bits})
