"""Building a cache for a model: its layers, ladders and kernels, and the attention that the model runs with it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

from transformers import PreTrainedModel
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
    StaticCache,
)
from transformers.configuration_utils import PreTrainedConfig

from fade_core.cache.attention import take_rows
from fade_core.cache.layer import TieredLayer
from fade_core.cache.layer_plan import LayerPlan
from fade_core.cache.layer_steps import bucket
from fade_core.cache.masks import MaskReader
from fade_core.cache.model_check import Findings, check_model
from fade_core.cache.rope_schemes import known_scheme, layer_schemes
from fade_core.config import FadeConfig
from fade_core.config.kernel_selection import choose_kernel
from fade_core.errors import ConfigError, UnsupportedModelError
from fade_core.eviction.attention_tracker import AttentionTracker
from fade_core.eviction.byte_budget import ByteBudget, LayerShape, layer_budgets
from fade_core.eviction.ladder import Ladder
from fade_core.interfaces import (
    Event,
    EvictionPolicy,
    Kernel,
    Op,
    QuantizerConfig,
    QuantizerContext,
    RopeScheme,
    Side,
    TelemetrySink,
    Tier,
)
from fade_core.models.geometry import head_channels, kv_heads, query_heads
from fade_core.storage.codec import Codec
from fade_core.support.checks import FiniteCheck

SIDES: tuple[Side, Side] = ("key", "value")
_OPS: tuple[Op, ...] = ("decode_attention", "attention_mass", "append", "encode", "dequantize")

_BOUNDED = (DynamicSlidingWindowLayer, LinearAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer)
"""Layers of transformers' own that hold as much of a long prompt as of a short one."""


class Broadcast:
    """Sends an event to whatever is among ``sinks`` by then; a copy tells the same sinks.

    A sink that fails is told nothing more, and a warning says so: no forward pass ends for it.

    Args:
        sinks: receivers, which may come and go.
    """

    def __init__(self, sinks: list[TelemetrySink]) -> None:
        self.sinks = sinks

    def __call__(self, event: Event) -> None:
        for sink in [*self.sinks]:
            try:
                sink.emit(event)
            except Exception as error:  # noqa: BLE001 (sinks are anybody's)
                self.sinks.remove(sink)
                warnings.warn(
                    f"telemetry sink {type(sink).__name__} failed ({type(error).__name__}: {error}) and is told nothing more; "
                    "the cache goes on without it",
                    stacklevel=2,
                )

    def __deepcopy__(self, memo: dict[int, Any]) -> Broadcast:
        return Broadcast(list(self.sinks))


@dataclass
class Built:
    """What a cache is made of.

    Attributes:
        layers: one a layer of the model.
        policy: ranks tokens.
        tracker: attention statistics.
        attention: "fade" or "stock".
        refusals: why kernels that were asked first refused, by op.
        compile_refusal: why decoding cannot be compiled; empty if it can.
    """

    layers: list[Any]
    policy: EvictionPolicy
    tracker: AttentionTracker
    attention: str
    refusals: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    compile_refusal: str = ""


def build(
    model: PreTrainedModel, config: FadeConfig, max_cache_len: int | None, emit: Callable[[Event], None]
) -> Built:
    """The layers of a cache for ``model``.

    Args:
        model: a decoder-only transformers model.
        config: what to compress and how.
        max_cache_len: most tokens the cache may see; ``None`` for no limit.
        emit: where events go.

    Raises:
        ConfigError: a configuration that cannot work on this model.
        CheckpointError: a file of the configuration that is missing or was made for another model.
        UnsupportedModelError: a model without attention that FADE can compress.
    """
    text = model.config.get_text_config(decoder=True)
    own_layers = _own_layers(model, text)
    full = [index for index, plain in enumerate(own_layers) if type(plain) is DynamicLayer]
    found = check_model(model, frozenset(full))
    kept = _own_attention(model, config, found)
    mode = "stock" if kept else "fade"
    if not kept:
        take_rows(model)
    config.policy.check_model(model)
    policy = config.policy.build()
    statistics = policy.statistics if config.evicts or config.ladder or config.layers else ()
    tracker = AttentionTracker(statistics, policy.decay, policy.observes or config.observation_window)
    built = Built([], policy, tracker, mode)
    tiered = [index for index in full if index not in found.unfed]
    budgets = dict(zip(tiered, layer_budgets(config.policy, len(tiered)), strict=True))
    schemes, finite = _schemes(model, config, tiered, kept, max_cache_len), FiniteCheck(tiered[-1])
    masks = MaskReader()
    static = None if max_cache_len is None else StaticCache(config=text, max_cache_len=bucket(max_cache_len)).layers
    checked: list[QuantizerConfig] = []
    for index, plain in enumerate(own_layers):
        if index not in budgets:
            sliding = static is not None and type(plain) is DynamicSlidingWindowLayer
            built.layers.append(static[index] if static is not None and sliding else plain)
            continue
        own = config.for_layer(index, len(own_layers))
        ladder = _ladder(own, text, index, len(own_layers), model, budgets[index], tracker)
        for rung in own.resolved_ladder():
            for quantizer in (rung.keys, rung.values):
                if quantizer not in checked:
                    quantizer.check_model(model)
                    checked.append(quantizer)
        if mode == "stock" and ladder.bounded:
            raise ConfigError(
                f"{type(model).__name__} keeps its own attention here, which cannot leave evicted tokens out ({kept}); use a "
                "configuration without budget and bounded tiers"
            )
        kernels = {op: _kernel(op, own, ladder, text, model, built.refusals) for op in _OPS}
        made_from = own.model_dump_json(include={"keys", "values", "ladder", "tile"})
        plan = LayerPlan(
            index=index,
            num_layers=len(own_layers),
            ladder=ladder,
            policy=policy,
            every=config.policy.every,
            tracker=tracker,
            attention=mode,
            on_nonfinite=config.on_nonfinite,
            kernel=kernels["decode_attention"],
            mass_kernel=kernels["attention_mass"],
            append=kernels["append"],
            codec=Codec(kernels["encode"], kernels["dequantize"]),
            emit=emit,
            rope=schemes.get(index),
            turns=partial(known_scheme, config.rope, text, index),
            finite=finite,
            masks=masks,
            compatibility=f"{made_from} for {kv_heads(text, index)} heads in {len(own_layers)} layers",
            query_heads=query_heads(text, index),
        )
        built.layers.append(TieredLayer(plan, max_cache_len))
    built.compile_refusal = _uncompilable(built.layers)
    _mark_compiled(built, max_cache_len)
    return built


def _uncompilable(layers: list[Any]) -> str:
    """Why decoding with these layers cannot be compiled; empty if it can."""
    for index, layer in enumerate(layers):
        reason = ""
        if isinstance(layer, TieredLayer):
            if layer.plan.attention != "fade":
                reason = "the model keeps its own attention, which reads dequantised tokens"
        elif type(layer) is DynamicSlidingWindowLayer:
            reason = "transformers' sliding window grows; create the cache with max_cache_len for one of fixed size"
        elif not layer.is_compileable:
            reason = f"transformers cannot compile a {type(layer).__name__}"
        if reason:
            return f"layer {index}: {reason}"
    return ""


def _mark_compiled(built: Built, max_cache_len: int | None) -> None:
    tiered = [layer for layer in built.layers if isinstance(layer, TieredLayer)]
    for layer in tiered:
        layer.steps.compiles = max_cache_len is not None and not built.compile_refusal
    tiered[0].steps.checks_masks = True


def _ladder(
    config: FadeConfig,
    text: PreTrainedConfig,
    index: int,
    layers: int,
    model: PreTrainedModel,
    budget: int | float | None,
    tracker: AttentionTracker,
) -> Ladder:
    """The ladder of one layer, its quantizers built. Raises ``ConfigError`` for a budget that cannot be kept."""
    head_dim = head_channels(text, index)
    heads = kv_heads(text, index)
    tiers = []
    for rung in config.resolved_ladder():
        keys, values = (
            quantizer.build(QuantizerContext(head_dim, side, config.tile, index, layers, heads, model.device))
            for side, quantizer in zip(SIDES, (rung.keys, rung.values), strict=True)
        )
        tiers.append(Tier(rung.name, rung.capacity, keys, values))
    kept, found = config.n_sink + config.recent_window, cast(int | float | ByteBudget | None, budget)
    if isinstance(config.policy.budget, str):
        bytes_of = LayerShape(
            heads,
            query_heads(text, index),
            head_dim,
            model.dtype.itemsize,
            len(tracker.statistics),
            not config.policy.build().positional,
            tracker.query_statistics,
            config.reposition == "contiguous",
        )
        found = bytes_of.budget(cast(int, budget), tiers, kept + config.tile, config.policy.every)
        if found.shortfall(1):
            raise ConfigError(f"layer {index}: {found.shortfall(1)}")
    elif isinstance(budget, int) and budget < kept:
        raise ConfigError(
            f"policy.schedule leaves layer {index} {budget} tokens, fewer than n_sink and recent_window keep ({kept}); "
            "take a smaller ratio or a larger budget"
        )
    return Ladder(tuple(tiers), config.n_sink, config.recent_window, found, config.tile)


def _schemes(
    model: PreTrainedModel, config: FadeConfig, layers: list[int], kept: str, length_limit: int | None
) -> Mapping[int, RopeScheme | None]:
    """The embeddings by which the layers' survivors are re-positioned; none if they keep their positions."""
    if config.reposition == "keep":
        return {}
    found = layer_schemes(config.rope, model, layers, length_limit)
    if kept:
        raise ConfigError(
            f"{type(model).__name__} keeps its own attention here ({kept}), which reads every key where it is: reposition = "
            "'contiguous' needs FADE's; use reposition = 'keep'"
        )
    return found


def _kernel(
    op: Op,
    config: FadeConfig,
    ladder: Ladder,
    text: PreTrainedConfig,
    model: PreTrainedModel,
    refusals: dict[str, list[tuple[str, str]]],
) -> Kernel:
    """The implementation of ``op`` for a ladder; why others refused goes into ``refusals``."""
    packed = ladder.tiers[0].keys if ladder.tiers else None
    head_dim = packed.head_dim if packed else head_channels(text, 0)
    kernel, refusals[op] = choose_kernel(
        op, config.kernel, packed.format if packed else None, head_dim, model.device, model.dtype
    )
    return kernel


def _own_layers(model: PreTrainedModel, text: PreTrainedConfig) -> list[Any]:
    """The layers that transformers' own cache would have. Raises ``UnsupportedModelError`` where none can be tiered."""
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model; FADE compresses decoder-only models. Use transformers' EncoderDecoderCache."
        )
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} uses multi-head latent attention (kv_lora_rank={text.kv_lora_rank}): its cache already holds a compressed "
            "latent, and the value slot holds rotary keys, which must not be quantized. Use transformers' DynamicCache."
        )
    if not getattr(text, "num_attention_heads", None):
        raise UnsupportedModelError(
            f"{name} has no attention layers, so it has no KV cache to compress; generate without FADE"
        )
    layers: list[Any] = DynamicCache(config=text).layers
    if not any(type(layer) is DynamicLayer for layer in layers):
        kinds = ", ".join(sorted({type(layer).__name__ for layer in layers})) or "none"
        growing = sorted({type(layer).__name__ for layer in layers if type(layer) not in _BOUNDED})
        raise UnsupportedModelError(
            f"{name} has no full-attention layer that FADE compresses (found: {kinds}); "
            + (
                f"{', '.join(growing)} keeps more than keys and values of all tokens"
                if growing
                else "what they hold is already bounded"
            )
            + ". Use transformers' DynamicCache."
        )
    return layers


def _own_attention(model: PreTrainedModel, config: FadeConfig, found: Findings) -> str:
    """Why the model keeps its own attention; empty if it runs FADE's. Raises ``UnsupportedModelError``."""
    if config.attention == "stock":
        return "the configuration says attention = 'stock'"
    if found.reason and config.attention == "fade":
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot run FADE's attention: {found.reason}; use attention = 'auto' or 'stock'"
        )
    return found.reason
