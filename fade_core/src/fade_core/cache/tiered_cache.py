"""The cache that a model generates with: tiered layers where attention is full, transformers' own elsewhere."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    StaticCache,
    StaticLayer,
)
from transformers.configuration_utils import PreTrainedConfig

from fade_core.cache import attention, checkpoint, rows
from fade_core.cache.fixed import FixedLayer
from fade_core.cache.fixedplan import bucket, refusal
from fade_core.cache.layer import TieredLayer
from fade_core.cache.layer_plan import LayerPlan
from fade_core.cache.memory_report import MemoryReport, measure
from fade_core.cache.rope_schemes import layer_schemes
from fade_core.config import FadeConfig
from fade_core.config.kernel_selection import choose_kernel
from fade_core.errors import ConfigError, InputError, UnsupportedModelError
from fade_core.eviction.attention_tracker import AttentionTracker
from fade_core.eviction.byte_budget import ByteBudget, LayerShape, layer_budgets
from fade_core.eviction.ladder import Ladder, describe
from fade_core.interfaces import (
    Event,
    Kernel,
    Op,
    Quantizer,
    QuantizerConfig,
    QuantizerContext,
    RopeScheme,
    Side,
    TelemetrySink,
    Tier,
)
from fade_core.models.geometry import head_channels, kv_heads, query_heads
from fade_core.storage.codec import Codec
from fade_core.support.checks import FiniteCheck, check_finite, check_room, check_tokens

SIDES: tuple[Side, Side] = ("key", "value")
_OPS: tuple[Op, ...] = ("decode_attention", "attention_mass", "append", "encode", "dequantize")


def create_tiered_cache(
    model: PreTrainedModel,
    config: FadeConfig | None = None,
    max_cache_len: int | None = None,
    **overrides: Any,
) -> TieredKVCache:
    """A compressed KV cache for ``model``: pass it to ``model.generate(..., past_key_values=cache)``.

    Args:
        model: a decoder-only transformers model.
        config: what to compress and how; ``FadeConfig.safe()`` by default.
        max_cache_len: most tokens the cache may see; longer input is refused before anything changes. Where the ladder has
            one tier, buffers of that size (of what is kept, if tokens are evicted) are allocated once and ``generate`` can
            compile the decode step (``is_compileable``); ``compile_refusal`` says why not elsewhere, and the cache grows up
            to there.
        **overrides: fields of the configuration to change, flat spelling included.

    Raises:
        ConfigError: a configuration that cannot work on this model.
        CheckpointError: a calibration or codebook file of the configuration that is missing or was made for another model.
        UnsupportedModelError: a model without attention that FADE can compress; says what to do.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"model must be a PreTrainedModel of transformers, found {type(model).__name__}; load_model takes names and paths"
        )
    config = FadeConfig.safe() if config is None else config
    if not isinstance(config, FadeConfig):
        raise ConfigError(
            f"config must be a FadeConfig, found {type(config).__name__}; see FadeConfig.from_file or .safe()"
        )
    return TieredKVCache(model, config.with_overrides(**overrides) if overrides else config, max_cache_len)


class TieredKVCache(Cache):
    """Tokens in tiers by age and attention, really freed as they go down; works in every mode of ``generate``.

    While the cache lives, its model runs FADE's attention; ``detach`` (or leaving it as a context manager, or dropping the
    cache) restores what the model had. Other caches keep working on the model all the time.

    Args:
        model: a decoder-only transformers model.
        config: what to compress and how.
        max_cache_len: most tokens the cache may see; see ``create_tiered_cache``.

    Attributes:
        compile_refusal: why decoding cannot be compiled with this cache; empty if it can.
    """

    def __init__(self, model: PreTrainedModel, config: FadeConfig, max_cache_len: int | None = None) -> None:
        if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
            raise ConfigError(f"max_cache_len={max_cache_len!r} must be a positive number of tokens or None")
        text = model.config.get_text_config(decoder=True)
        own_layers = _own_layers(model, text)
        self.config, self.model_config, self.length_limit = config, text, max_cache_len
        self.device, self.weights_mark = model.device, checkpoint.weights_mark(model)
        self.sinks: list[TelemetrySink] = []
        self._emit = _emitter(self.sinks)
        self.refusals: dict[str, list[tuple[str, str]]] = {}
        mode = _attention_mode(model, config)
        config.policy.check_model(model)
        self.policy = policy = config.policy.build()
        self.tracker = AttentionTracker(
            policy.statistics if config.evicts or config.ladder or config.layers else (),
            policy.decay,
            policy.observes or config.observation_window,
        )
        layers: list[Any] = []
        checked: list[QuantizerConfig] = []
        appenders: dict[int, tuple[Kernel, str]] = {}
        tiered = [index for index, plain in enumerate(own_layers) if type(plain) is DynamicLayer]
        budgets = dict(zip(tiered, layer_budgets(config.policy, len(tiered)), strict=True))
        schemes, finite = self._schemes(model, tiered, mode), FiniteCheck(tiered[-1])
        for index, plain in enumerate(own_layers):
            if index not in budgets:
                layers.append(plain)
                continue
            own = config.for_layer(index, len(own_layers))
            ladder = self._ladder(own, text, index, len(own_layers), model, budgets[index])
            for rung in own.resolved_ladder():
                for quantizer in (rung.keys, rung.values):
                    if quantizer not in checked:
                        quantizer.check_model(model)
                        checked.append(quantizer)
            if mode == "stock" and ladder.bounded:
                raise ConfigError(
                    f"{type(model).__name__} keeps its own attention here, which cannot leave evicted tokens out; use a "
                    "configuration without budget and bounded tiers, or a model that takes attn_implementation='fade'"
                )
            kernels: dict[Op, Kernel] = {op: self._kernel(op, own, ladder, text, model) for op in _OPS}
            plan = LayerPlan(
                index,
                len(own_layers),
                ladder,
                policy,
                config.policy.every,
                self.tracker,
                mode,
                config.on_nonfinite,
                kernels["decode_attention"],
                kernels["attention_mass"],
                Codec(kernels["encode"], kernels["dequantize"]),
                self._emit,
                _weakly(self._roll_back),
                schemes.get(index),
                finite,
            )
            layers.append(TieredLayer(plan, max_cache_len))
            made_from = own.model_dump_json(include={"keys", "values", "ladder", "tile"})
            heads = kv_heads(text, index)
            appenders[index] = kernels["append"], f"{made_from} for {heads} heads in {len(own_layers)} layers"
        self.compile_refusal = _not_fixed(layers, max_cache_len)
        if max_cache_len is not None and not self.compile_refusal:
            layers = _fixed(layers, appenders, text, max_cache_len)
        super().__init__(layers=layers)
        self._last = max(
            i for i, layer in enumerate(layers) if isinstance(layer, TieredLayer) or _replaces_tensors(layer)
        )
        self._reading = False
        self._before: dict[int, dict[str, Any]] = {}
        self._overwritten: set[int] = set()
        self.attention = mode
        self._own_sinks = [sink.build() for sink in config.telemetry]
        self.sinks += self._own_sinks
        self._detach = _attach(model, self) if mode == "fade" else lambda: None

    # --- life with the model ---
    def detach(self) -> None:
        """Give the model back the attention it had before. The cache keeps its contents; calling twice is harmless."""
        self._detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
        for sink in self._own_sinks:
            sink.close()
            self.sinks.remove(sink)  # what still happens to the cache is told to attached sinks only
        self._own_sinks.clear()

    @property
    def tiered(self) -> list[TieredLayer]:
        """The layers that FADE compresses."""
        return [layer for layer in self.layers if isinstance(layer, TieredLayer)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new tokens ``[B, H_kv, Q, D]`` to a layer. Raises ``InputError`` for a layer that does not exist."""
        if not 0 <= layer_idx < len(self.layers):
            raise InputError(f"layer {layer_idx} does not exist: the cache was built for {len(self.layers)} layers")
        layer = self.layers[layer_idx]
        if not self.compile_refusal and torch.compiler.is_compiling():
            traced: tuple[Tensor, Tensor] = layer.update(key_states, value_states, *args, **kwargs)
            return traced
        if self._reading and not isinstance(layer, TieredLayer):
            apart: tuple[Tensor, Tensor] = copy.copy(layer).update(key_states, value_states, *args, **kwargs)
            return apart
        if _replaces_tensors(layer):
            key_states, value_states = self._admitted(layer, layer_idx, key_states, value_states)
            self._before[layer_idx] = dict(vars(layer))
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self._last:
            self._commit()  # no layer can refuse this pass any more
        return found

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Hand a linear layer its convolution's state, which it writes over: that cannot be taken back."""
        self._overwritten.add(layer_idx)
        return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Likewise its recurrent state."""
        self._overwritten.add(layer_idx)
        return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    def activate_past_recording(self) -> None:
        """Tokens may be taken back from here on (assisted decoding). Raises ``UnsupportedModelError`` as ``crop`` does."""
        self._check_all("crop")
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            UnsupportedModelError: if a layer of transformers' own cannot; nothing has changed then.
        """
        self._check_all("crop")
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times. Raises ``UnsupportedModelError`` as ``crop`` does."""
        self._check_all("batch_repeat_interleave")
        rows = max((layer.batch_size for layer in self.tiered), default=-1)
        for layer in self.layers:
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.batch_repeat_interleave(repeats)
            elif rows > 0:  # states move with reorder_cache alone
                layer.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows. Raises ``UnsupportedModelError`` as ``crop`` does."""
        self._check_all("batch_select_indices")
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(rows)  # states move with it alone
            else:
                layer.batch_select_indices(rows)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Length and offset of the mask of the next pass. It is asked for before each: that is when tokens are ranked."""
        if not torch.compiler.is_compiling():
            for layer in self.layers:
                if isinstance(layer, FixedLayer):
                    layer.between(int(query_length))
        sizes: tuple[int, int] = super().get_mask_sizes(query_length, layer_idx)
        return sizes

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Logical length for masks; a tensor where only the device knows it (compiled steps)."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        return layer.query_offset() if isinstance(layer, FixedLayer) else self.get_seq_length(layer_idx)

    def reset(self) -> None:
        """Forget everything; the cache can be used again. Memory is freed, save for buffers of fixed size, which stay."""
        self._before.clear()
        self._overwritten.clear()
        super().reset()

    @torch.no_grad()
    def prefill(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        chunk: int | None = None,
        **options: Any,
    ) -> Any:
        """Feed a prompt in the way that the policy wants; for most that is one forward pass of ``model``.

        ``generate`` goes on from a cache that holds all tokens but the last, so that
        ``cache.prefill(model, ids[:, :-1])`` and then ``model.generate(ids, past_key_values=cache)`` is a whole.

        Args:
            model: the model that the cache was made for.
            input_ids: int64 ``[B, T]``.
            attention_mask: int ``[B, T]``, 0 for padding on the left; ``None`` for none.
            chunk: tokens a forward pass; ``None`` for all at once.
            options: further arguments of the model, such as ``logits_to_keep``.

        Returns:
            the model's output for the last tokens that were fed.

        Raises:
            InputError: if the cache holds tokens already, or ``chunk`` is not positive.
        """
        if self.get_seq_length():
            raise InputError(f"the cache holds {self.get_seq_length()} tokens; prefill takes an empty one")
        if chunk is not None and chunk < 1:
            raise InputError(f"chunk={chunk} must be at least one token")
        return self.policy.prefill(model, self, input_ids, attention_mask, chunk, **options)

    # --- rows come and go ---
    @property
    def leading_padding(self) -> Tensor:
        """Columns of padding before each row's first token, int64 ``[B]`` on the CPU; ``[0]`` while empty."""
        self.settle()
        return self.tiered[0].padding.clone()

    def add_rows(self, other: TieredKVCache) -> tuple[int, int]:
        """Take over the rows of another cache of the same model and configuration, behind one's own.

        The cache then has the longer of both logical lengths; rows of the shorter one have more padding on their left. A
        prompt can so be run through the model alone, in a cache of its own, and decoded together with others:
        ``attention_mask`` is 0 where a row has padding, and ``position_ids`` count each row's own tokens
        (docs/serving.md).

        Args:
            other: the cache whose rows come. It is empty afterwards, ready for another prompt, so that no layer's tokens
                are held twice. An empty cache takes everything over, what its quantizers learnt included.

        Returns:
            columns of padding that this cache's rows, and the other's, got on their left.

        Raises:
            InputError: if ``other`` is empty, of another model, configuration, dtype or device, in the middle of something
                (assisted decoding, ``holding``, ``reading``, an interrupted pass), longer than ``max_cache_len``, more than a
                budget in bytes can hold, or coded by quantizers that learnt from another prompt; or if the model has
                layers whose rows cannot be joined. Neither cache has changed then.
        """
        return rows.join(self, other)

    def keep_rows(self, indices: Tensor | Sequence[int], trim: bool = True) -> int:
        """Keep some rows, in the order given, and free what only the others held.

        Args:
            indices: row numbers ``[n]``, or bool ``[B]``.
            trim: cut off the leading columns that are padding in all rows that stay, so that the logical length does not
                grow for ever; the caller's ``attention_mask`` has to lose as many columns.

        Returns:
            columns that were cut off.

        Raises:
            InputError: for no row at all (``reset`` empties a cache), one named twice or one that does not exist, or in the
                middle of something, as for ``add_rows``; nothing has changed then.
        """
        return rows.keep(self, torch.as_tensor(indices), trim)

    def settle(self) -> None:
        """Finish what an interrupted forward pass or stock attention left pending."""
        for layer in self.tiered:
            layer.settle()
        self._commit()

    def rank(self) -> None:
        """Re-score every token of every layer and re-fill the ladder now."""
        self.settle()
        for layer in self.tiered:
            layer.rank()

    @contextlib.contextmanager
    def holding(self) -> Iterator[None]:
        """Inside the block tokens stay in full precision and nothing is evicted; at its end they go down the ladder.

        Whatever a policy needs to learn of a prompt before it scores it is learnt inside. Costs what an uncompressed
        cache of the same tokens does, until the end of the block.
        """
        self.settle()
        for layer in self.tiered:
            layer.holding = True
        try:
            yield
        except BaseException:  # no pass is known to be complete: nothing is ranked by it
            for layer in self.tiered:
                layer.holding = False
            raise
        self.settle()
        for layer in self.tiered:
            layer.release()

    @property
    def unreadable(self) -> str:
        """Why ``reading`` does not work on this model; empty if it does."""
        if self.attention != "fade":
            return "the model keeps its own attention"
        stateful = [type(layer).__name__ for layer in self.layers if not _can_be_read(layer)]
        return f"its {stateful[0]} keeps a state that each pass overwrites" if stateful else ""

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Forward passes inside the block read the cache and leave nothing in it but the statistic "reread".

        Raises:
            InputError: if there is nothing to read.
            UnsupportedModelError: if a layer of the model keeps a state that cannot be left as it was, or the model keeps
                its own attention.
        """
        if self.unreadable:
            raise UnsupportedModelError(f"this cache cannot be read without writing into it: {self.unreadable}")
        if not all(layer.is_initialized for layer in self.tiered):
            raise InputError("the cache is empty: there is nothing to read yet")
        self.settle()
        self._reading = True
        for layer in self.tiered:
            layer.reading = True
        try:
            yield
        finally:
            for layer in self.tiered:
                layer.settle()  # of a pass that was interrupted
                layer.reading = False
            self._reading = False

    def enable_compile(self) -> None:
        """Make sure that ``generate`` compiles the decode step; caches of fixed size do so by themselves.

        Raises:
            ConfigError: if this cache is not one, with the reason (``compile_refusal``); decoding works uncompiled.
        """
        if self.compile_refusal:
            raise ConfigError(
                f"decoding cannot be compiled with this cache: {self.compile_refusal}. Decode uncompiled."
            )

    def set_codebooks(self, codebooks: Mapping[str, Tensor]) -> None:
        """Give the quantizers of every layer tensors they need to decode (codebooks), as ``"layer.side.name"``.

        Raises:
            InputError: if the cache already holds tokens, or a name belongs to no quantizer.
        """
        if any(layer.is_initialized for layer in self.tiered):
            raise InputError("the cache holds tokens coded with other codebooks; set codebooks on a fresh cache")
        known: dict[str, tuple[Quantizer, dict[str, Tensor]]] = {}
        for layer in self.tiered:
            for tier in layer.plan.ladder.tiers:
                for side, quantizer in (("keys", tier.keys), ("values", tier.values)):
                    for name in quantizer.state_dict():
                        known[f"{layer.index}.{side}.{name}"] = (quantizer, {})
        unknown = [name for name in codebooks if name not in known]
        if unknown:
            raise InputError(
                f"no quantizer takes {unknown[:3]}; this configuration knows {sorted(known)[:6] or 'none'}"
            )
        for name, tensor in codebooks.items():
            quantizer, _ = known[name]
            quantizer.load_state_dict({**quantizer.state_dict(), name.rsplit(".", 1)[1]: tensor})

    # --- what is held ---
    def memory_report(self) -> MemoryReport:
        """Bytes by layer, tier and kind; ``.total`` is the sum over live tensors."""
        self.settle()
        return measure(self)

    def compressed_storage_bytes(self) -> int:
        """Bytes of everything the cache holds."""
        return self.memory_report().total

    def baseline_bytes(self) -> int:
        """Bytes that an uncompressed cache of the same tokens holds in the model's dtype."""
        return self.memory_report().baseline

    def compression_ratio(self) -> float:
        """``baseline_bytes / compressed_storage_bytes``; 1.0 while empty."""
        report = self.memory_report()
        return report.baseline / report.total if report.total else 1.0

    def tier_names(self) -> list[str]:
        """Names of the tiers that ``tier_map`` numbers: full precision first."""
        tiers = self.tiered[0].plan.ladder.tiers if self.tiered else ()
        return ["fp16", *(tier.name for tier in tiers)]

    # --- saving ---
    def cache_state_dict(self) -> dict[str, Any]:
        """Everything that decoding goes on from: tensors and plain numbers."""
        self.settle()
        return checkpoint.state_of(self)

    def load_cache_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; refused with ``CheckpointError``, and nothing changed, if it belongs elsewhere."""
        checkpoint.restore(self, state)

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file."""
        checkpoint.save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel) -> TieredKVCache:
        """A cache as it was saved, on ``model``. Raises ``CheckpointError`` if the file is not for it."""
        return checkpoint.load(path, model, cls)

    def dump_debug(self, path: str | Path) -> None:
        """Write what lives where (lengths, tiers, bytes, configuration) as JSON."""
        checkpoint.dump_debug(self, path)

    # --- inside ---
    def _ladder(
        self,
        config: FadeConfig,
        text: PreTrainedConfig,
        index: int,
        layers: int,
        model: PreTrainedModel,
        budget: int | float | None,
    ) -> Ladder:
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
                len(self.tracker.statistics),
                not config.policy.build().positional,
                self.tracker.query_statistics,
                self.config.reposition == "contiguous",
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

    def _schemes(self, model: PreTrainedModel, layers: list[int], mode: str) -> dict[int, RopeScheme | None]:
        """The embeddings by which the layers' survivors are re-positioned; none if they keep their positions."""
        if self.config.reposition == "keep":
            return {}
        found = layer_schemes(self.config.rope, model, layers, self.length_limit)
        if mode == "stock":
            raise ConfigError(
                f"{type(model).__name__} keeps its own attention here, which reads every key where it is: reposition = "
                "'contiguous' needs FADE's; use reposition = 'keep', or a model that takes attn_implementation='fade'"
            )
        return found

    def _kernel(
        self, op: Op, config: FadeConfig, ladder: Ladder, text: PreTrainedConfig, model: PreTrainedModel
    ) -> Kernel:
        packed = ladder.tiers[0].keys if ladder.tiers else None
        head_dim = packed.head_dim if packed else head_channels(text, 0)
        kernel, refusals = choose_kernel(
            op, config.kernel, packed.format if packed else None, head_dim, model.device, model.dtype
        )
        self.refusals[op] = refusals
        return kernel

    def _check_all(self, method: str) -> None:
        """Refuse what transformers' own layers of fixed size do not offer. Raises ``UnsupportedModelError``."""
        for index, layer in enumerate(self.layers):
            if isinstance(layer, StaticLayer) and not hasattr(layer, method):
                raise UnsupportedModelError(
                    f"layer {index}: transformers' {type(layer).__name__} has no {method}, which assisted decoding, taking "
                    "tokens back or choosing rows needs; create the cache without max_cache_len for this"
                )

    def _admitted(self, layer: DynamicLayer, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """New tokens that a layer of transformers' own can take. Raises ``InputError``."""
        length = layer.get_seq_length()
        try:
            check_tokens(index, keys, values, (layer.keys, layer.values) if length else None)
            check_room(index, length, keys.shape[2], self.length_limit)
            return check_finite(index, keys, values, length, self.config.on_nonfinite)
        except InputError as error:
            raise type(error)(f"{error} {self._roll_back(index, length)}") from None

    def _commit(self) -> None:
        """The forward pass can no longer fail: what it replaced is freed."""
        self._before.clear()
        self._overwritten.clear()
        for layer in self.tiered:
            layer.commit()

    def _roll_back(self, failed: int, length: int) -> str:
        """Take the layers before ``failed`` back to ``length`` tokens; says what became of the cache."""
        lost = [index for index in range(failed) if not self._took_back(index, length)]
        self._emit(Event("rollback", failed, detail={"length": 0 if lost else length}))
        if lost:
            self.reset()
            return (
                f"Layer {lost[0]} ({type(self.layers[lost[0]]).__name__}) cannot be taken back a step, so the whole cache "
                "was emptied: start again from the first token."
            )
        return "The cache is as it was before this step."

    def _took_back(self, index: int, length: int) -> bool:
        layer = self.layers[index]
        if isinstance(layer, TieredLayer):
            if layer.logical > length:
                layer.go_back()
            return layer.logical <= length
        if index in self._before:
            vars(layer).clear()  # what the pass added goes too
            vars(layer).update(self._before.pop(index))
        elif index in self._overwritten:
            layer.reset()
            return not length
        elif isinstance(layer, StaticLayer):
            return int(layer.get_seq_length()) <= length
        return True

    def __repr__(self) -> str:
        tiered = self.tiered
        ladder = describe(tiered[0].plan.ladder.tiers) if tiered else "nothing"
        held = f"{len(tiered)} of {len(self.layers)} layers tiered, fp16 > {ladder}"
        return f"TieredKVCache({held}, {self.get_seq_length()} tokens)"


def _emitter(sinks: list[TelemetrySink]) -> Callable[[Event], None]:
    """Sends an event to whatever is among ``sinks`` by then; does not keep the cache alive."""

    def emit(event: Event) -> None:
        for sink in sinks:
            sink.emit(event)

    return emit


def _weakly(method: Callable[[int, int], str]) -> Callable[[int, int], str]:
    """Calls ``method`` without keeping its object alive: a cache is freed as soon as its last user lets go of it."""
    reference = weakref.WeakMethod(method)

    def call(index: int, length: int) -> str:
        found = reference()
        return "" if found is None else found(index, length)

    return call


def _not_fixed(layers: list[Any], max_cache_len: int | None) -> str:
    """Why these layers cannot be of fixed size, or are not; empty if they are to be."""
    if max_cache_len is None:
        return "its buffers grow with the context; create it with max_cache_len for buffers of fixed size"
    for index, layer in enumerate(layers):
        if isinstance(layer, TieredLayer):
            reason = refusal(layer.plan)
        elif type(layer) is DynamicSlidingWindowLayer or layer.is_compileable:
            continue
        else:
            reason = f"transformers cannot compile a {type(layer).__name__}"
        if reason:
            return f"layer {index}: {reason}"
    return ""


def _fixed(
    layers: list[Any], appenders: Mapping[int, tuple[Kernel, str]], text: PreTrainedConfig, max_cache_len: int
) -> list[Any]:
    """The same layers in buffers of fixed size; sliding windows become transformers' static ones."""
    static = StaticCache(config=text, max_cache_len=bucket(max_cache_len)).layers
    found: list[Any] = []
    for index, layer in enumerate(layers):
        if isinstance(layer, TieredLayer):
            append, meaning = appenders[index]
            layer = FixedLayer(layer.plan, max_cache_len, meaning, append, query_heads(text, index))
            layer.watches = not any(isinstance(before, FixedLayer) for before in found)
        elif type(layer) is DynamicSlidingWindowLayer:
            layer = static[index]
        found.append(layer)
    return found


def _replaces_tensors(layer: Any) -> bool:
    """Whether a layer of transformers' own makes new tensors at each update, so that the old ones can be gone back to."""
    return isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin)


def _can_be_read(layer: Any) -> bool:
    """Whether a forward pass can leave a layer as it was."""
    return isinstance(layer, TieredLayer) or _replaces_tensors(layer)


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
        raise UnsupportedModelError(
            f"{name} has no full-attention layer (found: {kinds}); the caches of the others are already bounded. "
            "Use transformers' DynamicCache."
        )
    return layers


def _attention_mode(model: PreTrainedModel, config: FadeConfig) -> str:
    """Either "fade" or "stock", as the configuration asks and the model allows."""
    if config.attention == "stock":
        return "stock"
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(attention.NAME)
    except (ValueError, ImportError) as error:
        if config.attention == "fade":
            raise UnsupportedModelError(
                f"{type(model).__name__} does not take attn_implementation='fade' ({error}); use attention = 'auto' or 'stock'"
            ) from error
        return "stock"
    took = model.config.get_text_config(decoder=True)._attn_implementation == attention.NAME
    model.set_attn_implementation(before)
    if not took and config.attention == "fade":
        raise UnsupportedModelError(
            f"{type(model).__name__} ignores attn_implementation='fade'; use attention = 'auto' or 'stock'"
        )
    return "fade" if took else "stock"


_attached: weakref.WeakKeyDictionary[PreTrainedModel, tuple[str, set[int]]] = weakref.WeakKeyDictionary()


def _attach(model: PreTrainedModel, cache: TieredKVCache) -> Callable[[], Any]:
    """Run the model with FADE's attention until the last cache on it lets go."""
    before, users = _attached.get(model, (str(model.config._attn_implementation), set()))
    if not users:
        model.set_attn_implementation(attention.NAME)
    token = id(cache)
    users.add(token)
    _attached[model] = (before, users)
    owner = weakref.ref(model)

    def let_go() -> None:
        held = owner()
        if held is None or held not in _attached:
            return
        original, left = _attached[held]
        left.discard(token)
        if not left:
            del _attached[held]
            held.set_attn_implementation(original)

    return weakref.finalize(cache, let_go)
