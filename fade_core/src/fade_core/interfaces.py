"""What a plugin implements. Nothing here imports transformers.

Shapes: ``B`` rows, ``H_q`` query heads, ``H_kv`` key/value heads, ``T`` tokens, ``D`` channels of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fade_core.errors import CheckpointError, InputError
from fade_core.packed import Layout, Packed, PackedFormat
from fade_core.validation import Budget, Capacity, CheckedModel, Count

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic import GetJsonSchemaHandler
    from pydantic_core import CoreSchema

Side = Literal["key", "value"]


# --- quantizers --------------------------------------------------------------------------------------------------


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
    _found: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """What ``compute`` gives, computed by the first who asks: keys' and values' quantizers can share it."""
        if name not in self._found:
            self._found[name] = compute()
        return self._found[name]


@dataclass(frozen=True)
class PlainEncoding:
    """What ``encode`` does, for kernels: nearest codes on a uniform grid of ``format`` over each group of ``x @ rotation``.

    Attributes:
        rotation: float32 ``[D, D]`` on the tokens' device, kept alive and unchanged by the quantizer; ``None`` for none.
        outward: whether a minimum is rounded down to fp16 and a step up, so that the grid spans its group; both are
            rounded to nearest otherwise.
        decodes: whether ``decode`` is the way back and nothing else: ``code * scale + minimum``, times the transposed rotation.
    """

    rotation: Tensor | None = None
    outward: bool = True
    decodes: bool = False


@dataclass(frozen=True, eq=False)
class PlaneLayout:
    """Codes at even distances about a mean, as planes of 2 bits, for kernels.

    A plane holds two bits of each of 16 neighbouring transformed channels, for all tokens of a tile: ``R = tile / 8`` word
    rows, field ``j`` of word row ``r`` is token ``j * R + r``, as in a ``PackedFormat`` of 2 bits. A channel of ``2 * n``
    bits is in ``n`` planes. The planes of all heads of a row are one stream of words a tile: word ``w`` of it is word
    ``w % row`` of field ``codes`` (int16 ``[row]``) of the tile that head ``w // row`` has (``Quantizer.heads_together``).
    In byte ``i`` of field ``gain`` (uint8 ``[tile // 2]``) token ``i`` has the low half, token ``i + tile // 2`` the high one.

    Channel ``c`` of a token is ``y[c] = gain * sum((field - 1.5) * scale)`` over the planes that hold the channel, with
    ``gain = 2 ** ((gain_code - gain_zero) / gain_steps + usual)``, and the token is ``mean + (y * deviation) @ inverse``.

    The way there: ``y = (token - mean) @ forward / deviation``. The gain code nearest to the root mean square of the stored
    channels of ``y``, and those ``gain_search`` away from it, are tried for the least squared error weighted by ``worth``.

    All tensors are on the tokens' device, contiguous.

    Attributes:
        tile: tokens a tile.
        row: words of the stream that a head's tile holds, a multiple of 16.
        layout: "token" for planes ``[R, 16]`` (keys), "channel" for ``[16, R]`` (values).
        planes: int32 ``[H_kv, P, 4]``: where each plane of a head begins in the stream, its first channel, how far its bits
            are shifted in the codes of its channels, and the width of those.
        scales: float32 ``[H_kv, P]``, what one step of its fields is worth; 0 where a head has fewer than ``P`` planes.
        usual: float32 ``[H_kv]``, base-2 logarithm of the gain of code ``gain_zero``.
        gain_zero: as above.
        gain_steps: gain codes an octave.
        gain_search: the first and the last gain code that are tried, from the nearest one.
        mean: float32 ``[H_kv, D]``.
        deviation: float32 ``[H_kv, kept]``.
        worth: float32 ``[H_kv, kept]``; 0 where a channel is not stored.
        forward: float16 ``[H_kv, D, kept]``.
        inverse: float16 ``[H_kv, kept, D]``.
    """

    tile: int
    row: int
    layout: Layout
    planes: Tensor
    scales: Tensor
    usual: Tensor
    gain_zero: int
    gain_steps: int
    gain_search: tuple[int, int]
    mean: Tensor
    deviation: Tensor
    worth: Tensor
    forward: Tensor
    inverse: Tensor


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
        """Learn from a prompt; called before the first token is encoded, again for each chunk until then."""

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


# --- policies ----------------------------------------------------------------------------------------------------


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
    """

    kind: ClassVar[str] = ""
    statistics: tuple[str, ...] = ()
    observes: int | Literal["all"] | None = None
    decay: float = 0.99
    positional: bool = False

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


# --- rope --------------------------------------------------------------------------------------------------------


class RopeScheme(ABC):
    """A rotary embedding as a function of position. All arithmetic in float32.

    Attributes:
        kind: the name it is chosen by; "none" if it leaves everything as it is.
        fixed_until: tokens that a model may have seen before its frequencies change; ``None`` if they never do.
    """

    kind: ClassVar[str] = ""

    @property
    def fixed_until(self) -> int | None:
        """``None`` unless a scheme says otherwise."""
        return None

    @abstractmethod
    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Apply the embedding to ``[B, H, T, D]`` at int ``positions`` (broadcastable to ``[B, H, T]``)."""

    @abstractmethod
    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Undo ``rotate``."""

    def shift(self, x: Tensor, offset: Tensor) -> Tensor:
        """Move already rotated ``x`` by ``offset`` positions (``unrotate`` then ``rotate`` for plain rotations)."""
        return self.rotate(x, offset)


# --- kernels -----------------------------------------------------------------------------------------------------

Op = Literal["append", "decode_attention", "dequantize", "attention_mass", "encode"]


@dataclass(frozen=True)
class Support:
    """Answer of ``Kernel.supports``: truthy when it can run, else ``reason`` says why not."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


class Kernel(ABC):
    """One implementation of a named op. Choosing another implementation never changes meaning.

    Attributes:
        name: implementation name, unique for its op ("torch", "triton").
        op: which op it implements.
        priority: among those that support a case, ``auto`` takes the highest.
        shifts: whether it reads ``PackedSegment.shift``; where it does not, the core computes what is shifted itself.
    """

    name: ClassVar[str] = ""
    op: ClassVar[Op] = "decode_attention"
    priority: ClassVar[int] = 0
    shifts: ClassVar[bool] = False

    @abstractmethod
    def supports(self, format: PackedFormat | None, head_dim: int, device: torch.device, dtype: torch.dtype) -> Support:
        """Whether this case can run here, with the reason if not. Asked once, when a cache is built.

        Without a ``format`` nothing is known of the codes yet: a yes then means that ``accepts`` will look at each call.
        """

    def accepts(self, *args: Any, **kwargs: Any) -> Support:
        """Whether this very call can run; asked before it, with the same arguments.

        A mask or a number of queries is only known then. What is refused here the core computes with its oracle, and
        says so in a "fallback" event, once a layer and reason.
        """
        return Support(True)

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op (signature: the oracle's in ``fade_core.kernels``)."""


# --- configuration bases: what a plugin's hook returns --------------------------------------------------------------


class ComponentConfig(CheckedModel):
    """Base of every component's configuration: frozen, unknown fields refused, chosen by its ``kind`` literal."""

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        described = handler(schema)
        discriminator = "tier" if "tier" in cls.model_fields else "kind"
        required = handler.resolve_ref_schema(described).setdefault("required", [])
        if discriminator not in required:  # a default does not make it optional: it says which component this is
            required.insert(0, discriminator)
        return described


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


class RopeConfig(ComponentConfig):
    """Configuration of a RoPE scheme."""

    kind: str

    def build(self, model_config: Any, layer_idx: int | None = None) -> RopeScheme:
        """The scheme of a layer of a model, given its (text) config; ``None`` for that of its full-attention layers.

        Raises:
            ConfigError: if they do not match.
        """
        raise NotImplementedError(f"{type(self).__name__} must define build(model_config, layer_idx=None)")


class KernelConfig(ComponentConfig):
    """Which implementation runs each op. ``kind = "auto"`` takes the fastest that supports the case."""

    kind: str = "auto"


class TierConfig(ComponentConfig):
    """One rung of the ladder. Subclasses set ``tier: Literal["name"] = "name"``.

    Attributes:
        tier: literal name.
        capacity: tokens (int), a fraction of the context (float), or "rest".
    """

    tier: str
    capacity: Capacity = "rest"

    def label(self, keys: QuantizerConfig, values: QuantizerConfig) -> str:
        """What reports call this rung, given the quantizers that ``quantizers`` answered."""
        return self.tier

    def quantizers(
        self, keys: QuantizerConfig, values: QuantizerConfig
    ) -> tuple[QuantizerConfig, QuantizerConfig] | None:
        """Quantizers of this tier given the configuration's ``keys`` and ``values``; ``None`` evicts."""
        raise NotImplementedError(f"{type(self).__name__} must define quantizers(keys, values)")


@dataclass(frozen=True)
class Tier:
    """A rung of one layer's ladder, ready to hold tokens: name, capacity and its two quantizers."""

    name: str
    capacity: Capacity
    keys: Quantizer
    values: Quantizer


# --- telemetry ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Event:
    """Something that happened to the cache.

    Attributes:
        kind: "encode", "demote", "evict", "reassign", "fallback" or "rollback".
        layer: layer index.
        tokens: tokens concerned, summed over rows and heads.
        bytes_before: bytes the layer held before.
        bytes_after: bytes the layer holds after.
        seconds: time it took.
        detail: anything else, JSON-serialisable.
    """

    kind: str
    layer: int
    tokens: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    detail: Mapping[str, Any] = field(default_factory=dict)


class TelemetrySink(ABC):
    """Receives events. Never called once a token: only when tiles move."""

    @abstractmethod
    def emit(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:  # noqa: B027 (nothing to release is a good answer)
        """Flush and release what is held."""


class TelemetrySinkConfig(ComponentConfig):
    """Configuration of a telemetry sink. Subclasses set ``kind: Literal["name"] = "name"`` and ``build``."""

    kind: str

    def build(self) -> TelemetrySink:
        """The sink. Raises ``ConfigError`` if it cannot open what it writes to."""
        raise NotImplementedError(f"{type(self).__name__} must define build()")


# --- evaluation ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """A named way to compress a cache, which ``fade eval quality`` measures beside the others.

    Attributes:
        name: what tables and plots call it; unique over all plugins.
        fields: fields of a ``FadeConfig``; sinks and window are the command's unless they are among them.
        note: where it comes from (a paper, a preset), in a few words.
    """

    name: str
    fields: Mapping[str, Any]
    note: str = ""
