"""The cache that a model generates with: tiered layers where attention is full, transformers' own elsewhere."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from fade_core.cache.attachment import attach
from fade_core.cache.builder import Broadcast, build
from fade_core.cache.checkpoint import dump_debug, load, restore, save, state_of, weights_fingerprint
from fade_core.cache.memory_report import MemoryReport, measure
from fade_core.cache.named_caches import configuration
from fade_core.cache.passes import PassControl, can_be_read
from fade_core.cache.rows import join, keep
from fade_core.config import FadeConfig
from fade_core.errors import ConfigError, InputError, UnsupportedModelError
from fade_core.eviction.ladder import describe
from fade_core.interfaces import Quantizer, TelemetrySink


def create_tiered_cache(
    model: PreTrainedModel,
    config: FadeConfig | Mapping[str, Any] | str | Path | None = None,
    max_cache_len: int | None = None,
    **overrides: Any,
) -> TieredKVCache:
    """A compressed KV cache for ``model``: pass it to ``model.generate(..., past_key_values=cache)``.

    Args:
        model: a decoder-only transformers model.
        config: what to compress and how: a configuration, its fields, a preset's name ("safe") or a file; ``FadeConfig.safe()``
            by default.
        max_cache_len: most tokens the cache may see; longer input is refused before anything changes. Buffers for them (for
            what is kept, if tokens are evicted) are then allocated once, and ``generate`` compiles the decode step on a GPU
            (``is_compileable``); ``compile_refusal`` says why where it cannot. It never changes an answer.
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
    if not isinstance(config, (FadeConfig, Mapping, str, Path, type(None))):
        raise ConfigError(
            f"config must be a FadeConfig, its fields, a preset's name or a file; found {type(config).__name__}"
        )
    found = configuration(config)
    return TieredKVCache(model, found.with_overrides(**overrides) if overrides else found, max_cache_len)


class TieredKVCache(PassControl):
    """Tokens in tiers by age and attention, really freed as they go down; works in every mode of ``generate``.

    Its model runs FADE's attention in passes that carry the cache, and its own in all others: other caches, attention weights
    as output, continuous batching, a copy of the model and another attention that is set meanwhile are as without FADE.
    After ``detach`` (or leaving the cache as a context manager) they run its own with this cache, too.

    Args:
        model: a decoder-only transformers model.
        config: what to compress and how.
        max_cache_len: most tokens the cache may see; see ``create_tiered_cache``.

    Attributes:
        attached: whether passes with this cache run FADE's attention.
        compile_refusal: why decoding cannot be compiled with this cache; empty if it can.
    """

    def __init__(self, model: PreTrainedModel, config: FadeConfig, max_cache_len: int | None = None) -> None:
        if max_cache_len is not None and (type(max_cache_len) is not int or max_cache_len < 1):
            raise ConfigError(f"max_cache_len={max_cache_len!r} must be a positive number of tokens or None")
        self.config, self.length_limit = config, max_cache_len
        self.model_config = model.config.get_text_config(decoder=True)
        self.device, self.weights_fingerprint = model.device, weights_fingerprint(model)
        self.sinks: list[TelemetrySink] = []
        self._emit = Broadcast(self.sinks)
        built = build(model, config, max_cache_len, self._emit)
        self.policy, self.tracker, self.refusals = built.policy, built.tracker, built.refusals
        self.attention, self.compile_refusal = built.attention, built.compile_refusal
        super().__init__(layers=built.layers)
        self.start_passes()
        self._own_sinks = [sink.build() for sink in config.telemetry]
        self.sinks += self._own_sinks
        self.attached = self.attention == "fade"
        if self.attached:
            attach(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A whole cache of its own on the same model; what is only read (policy, fixed quantizers) and sinks are shared."""
        self.conclude()
        memo |= {id(shared): shared for shared in (self.policy, self.tracker, self.config, self.model_config)}
        for layer in self.tiered:
            if not layer.plan.learners:
                memo |= {id(part): part for part in (layer.plan.ladder, *layer.plan.ladder.tiers)}
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for name, value in vars(self).items():
            if name not in ("_own_sinks", "sinks", "_emit"):
                setattr(copied, name, copy.deepcopy(value, memo))
        copied._emit = copied.tiered[0].plan.emit  # type: ignore[assignment]
        copied.sinks, copied._own_sinks = copied._emit.sinks, []
        copied.start_passes()
        for layer in copied.tiered:
            layer.steps.replan(fresh=bool(layer.plan.learners))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickling, ``torch.save`` and ``copy.copy`` are refused: what is held belongs to a model. Raises ``InputError``."""
        raise InputError(
            "a cache is tied to its model and cannot be pickled or copied in part. save(path) writes it and "
            "TieredKVCache.load(path, model) reads it back; copy.deepcopy makes a cache of its own on the same model"
        )

    # --- life with the model ---
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()
        for sink in self._own_sinks:
            sink.close()
            if sink in self.sinks:  # what still happens to the cache is told to attached sinks only
                self.sinks.remove(sink)
        self._own_sinks.clear()

    def activate_past_recording(self) -> None:
        """Tokens may be taken back from here on (assisted decoding). Raises ``UnsupportedModelError`` as ``crop`` does."""
        self._check_all("crop")
        self.conclude()
        super().activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens.

        Raises:
            UnsupportedModelError: if a layer of transformers' own cannot; nothing has changed then.
        """
        self._check_all("crop")
        self.conclude()
        super().crop(tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times. Raises ``UnsupportedModelError`` as ``crop`` does."""
        self._check_all("batch_repeat_interleave")
        self.conclude()
        rows = max((layer.batch_size for layer in self.tiered), default=-1)
        for layer in self.layers:
            if not isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.batch_repeat_interleave(repeats)
            elif rows > 0:  # states move with reorder_cache alone
                layer.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep, repeat or reorder rows. Raises ``UnsupportedModelError`` as ``crop`` does."""
        self._check_all("batch_select_indices")
        self.conclude()
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        for layer in self.layers:
            if isinstance(layer, LinearAttentionCacheLayerMixin):
                layer.reorder_cache(rows)  # states move with it alone
            else:
                layer.batch_select_indices(rows)

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
        layer = self.tiered[0]
        return layer.held.padding.clone() if layer.is_initialized else torch.zeros(0, dtype=torch.long)

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
        return join(self, other)

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
        return keep(self, torch.as_tensor(indices), trim)

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
            layer.holding = False
            layer.settle(prompt=True)

    @property
    def unreadable(self) -> str:
        """Why ``reading`` does not work on this model; empty if it does."""
        if self.attention != "fade":
            return "the model keeps its own attention"
        stateful = [type(layer).__name__ for layer in self.layers if not can_be_read(layer)]
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
        """Make sure that ``generate`` compiles the decode step; a cache with ``max_cache_len`` does so by itself.

        One that grows is compiled again where its buffers do.

        Raises:
            ConfigError: if it cannot be, with the reason (``compile_refusal``); decoding works uncompiled.
        """
        if self.compile_refusal:
            raise ConfigError(
                f"decoding cannot be compiled with this cache: {self.compile_refusal}. Decode uncompiled."
            )
        for layer in self.tiered:
            layer.steps.compiles = True
            layer.steps.rewire()

    def disable_compile(self) -> None:
        """Take ``enable_compile`` back; what a cache that grows has reserved for compiled steps is freed."""
        self.settle()
        for layer in self.tiered:
            layer.stop_compiling()

    def set_codebooks(self, codebooks: Mapping[str, Tensor]) -> None:
        """Give the quantizers of every layer tensors they need to decode (codebooks), as ``"layer.side.name"``.

        Raises:
            InputError: if the cache already holds tokens, or a name belongs to no quantizer.
        """
        if any(layer.is_initialized for layer in self.tiered):
            raise InputError("the cache holds tokens coded with other codebooks; set codebooks on a fresh cache")
        known: dict[str, Quantizer] = {}
        for layer in self.tiered:
            for tier in layer.plan.ladder.tiers:
                for side, quantizer in (("keys", tier.keys), ("values", tier.values)):
                    for name in quantizer.state_dict():
                        known[f"{layer.index}.{side}.{name}"] = quantizer
        unknown = [name for name in codebooks if name not in known]
        if unknown:
            raise InputError(
                f"no quantizer takes {unknown[:3]}; this configuration knows {sorted(known)[:6] or 'none'}"
            )
        for name, tensor in codebooks.items():
            quantizer = known[name]
            quantizer.load_state_dict({**quantizer.state_dict(), name.rsplit(".", 1)[1]: tensor})

    # --- what is held, in numbers ---
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
        return state_of(self)

    def load_cache_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state; refused with ``CheckpointError``, and nothing changed, if it belongs elsewhere."""
        restore(self, state)

    def save(self, path: str | Path) -> None:
        """Write the cache to a safetensors file with a checksum: the whole file, or the old one stays.

        Raises:
            CheckpointError: if it cannot be written (a full disk, no permission, no such folder).
        """
        save(self, path)

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, max_cache_len: int | None = None) -> TieredKVCache:
        """A cache as it was saved, on ``model``.

        It sends events to nobody: a file cannot make its reader write another (``attach_telemetry`` adds sinks).

        Args:
            path: what ``save`` wrote.
            model: the model that filled it.
            max_cache_len: most tokens the cache may see, instead of what the file says.

        Raises:
            CheckpointError: if the file is damaged, not for this model, or asks for more room than is plausible.
        """
        return load(path, model, cls, max_cache_len)

    def dump_debug(self, path: str | Path) -> None:
        """Write what lives where (lengths, tiers, bytes, configuration) as JSON."""
        dump_debug(self, path)

    def __repr__(self) -> str:
        tiered = self.tiered
        ladder = describe(tiered[0].plan.ladder.tiers) if tiered else "nothing"
        held = f"{len(tiered)} of {len(self.layers)} layers tiered, fp16 > {ladder}"
        return f"TieredKVCache({held}, {self.get_seq_length()} tokens)"
