"""FADE's own decode loop, for ``model.generate(..., custom_generate=decode_loop)``."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import utils as generation
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput, GenerationMode

from fade_core.cache.step_recorder import StepRecorder
from fade_core.cache.tiered_cache import TieredKVCache
from fade_core.errors import InputError
from fade_core.support.transfer import fetched

ASK_EVERY = 8
"""Tokens after which the host asks whether the answer has ended."""


def decode_loop(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    ask_every: int = ASK_EVERY,
    record: bool | None = None,
    **model_kwargs: Any,
) -> Any:
    """Greedy decoding and sampling with a FADE cache; the tokens are those of ``generate``'s own loop.

    ``model.generate(ids, past_key_values=cache, custom_generate=decode_loop)`` calls it with what ``generate`` has prepared:
    processors, stopping criteria, configuration. On a GPU the model's step is recorded once as a CUDA graph, without a
    compiler, and replayed (``StepRecorder``); where ``generate`` was given a ``compile_config`` the compiled model is run
    instead. Tokens are chosen on the device, and the host asks once in several tokens whether the answer has ended: those
    that came after its end are taken back.

    What the loop cannot do it leaves to ``generate``'s own, with a warning that says why: beams, a cache that is not FADE's,
    attention weights or hidden states as output, encoder-decoders, models on several devices, synchronised GPUs. Its
    caller hands it no assistant model, which is refused: drafts need ``generate`` without ``custom_generate``.

    Args:
        model: the model that ``generate`` was called on.
        input_ids: the prompt, int64 ``[B, P]``.
        logits_processor: what changes scores, as ``generate`` has prepared it.
        stopping_criteria: what ends the answer, likewise.
        generation_config: the rest of the settings.
        synced_gpus: left to ``generate``'s own loop if true.
        streamer: takes the tokens, several at a time.
        ask_every: tokens between two questions whether the answer has ended; 1 where criteria or processors are not
            transformers' own and have no attribute ``looks_ahead`` that says they may see tokens which are dropped again, or
            where tokens cannot be taken back exactly (statistics of attention, states).
        record: whether steps are recorded; ``None`` on a GPU alone.
        **model_kwargs: arguments of the model, the cache among them.

    Returns:
        int64 ``[B, P + N]``, or ``GenerateDecoderOnlyOutput`` with ``return_dict_in_generate``.

    Raises:
        InputError: if ``generate`` was given an assistant model.
    """
    asked = _asked_of_generate()
    if asked.get("assistant_model") is not None:
        raise InputError("decode_loop was given an assistant model; drafts need generate without custom_generate")
    streamer = asked.get("streamer") if streamer is None else streamer
    given = {"logits_processor": logits_processor, "stopping_criteria": stopping_criteria}
    reason = _refusal(model, generation_config, synced_gpus, model_kwargs)
    if reason:
        warnings.warn(f"decode_loop leaves this to generate's own loop: {reason}", stacklevel=2)
        mode = getattr(type(model), generation.GENERATION_MODES_MAPPING[generation_config.get_generation_mode()])
        rest = {"generation_config": generation_config, "synced_gpus": synced_gpus, "streamer": streamer}
        return mode(model, input_ids, **given, **rest, **model_kwargs)
    cache = model_kwargs["past_key_values"]
    record = model.device.type == "cuda" if record is None else record
    compiled = generation_config.compile_config is not None and cache.is_compileable
    if record and cache.compile_refusal:
        warnings.warn(f"steps are run one by one, not recorded: {cache.compile_refusal}", stacklevel=2)
    answer = _Answer(generation_config, **given, streamer=streamer)
    with _steps_of_fixed_shape(cache, record and not compiled), model._optimize_model_for_decode():
        outputs = model._prefill(input_ids, generation_config, model_kwargs, is_first_iteration=True)
        recorder = StepRecorder(model, cache)
        if compiled:
            step = model.get_compiled_call(generation_config.compile_config)
        elif record and not cache.compile_refusal:
            step = recorder
        else:
            step = model
        ids = _decode(model, step, input_ids, outputs, answer, model_kwargs, ask_every)
    if recorder.refusal:
        warnings.warn(f"steps were run one by one: {recorder.refusal}", stacklevel=2)
    if not generation_config.return_dict_in_generate:
        return ids
    return GenerateDecoderOnlyOutput(sequences=ids, scores=answer.scores, logits=answer.logits, past_key_values=cache)


def _decode(
    model: PreTrainedModel,
    step: Any,
    ids: Tensor,
    outputs: Any,
    answer: _Answer,
    model_kwargs: dict[str, Any],
    ask_every: int,
) -> Tensor:
    """The prompt ``[B, P]`` with its answer behind it; ``outputs``: the model's, of the prompt."""
    cache = model_kwargs["past_key_values"]
    ahead, goes_on = 1, False
    while True:
        model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
        ids, outputs = answer.extend(ids, outputs.logits), None
        full, inputs = answer.full(ids), {}
        if not full:
            inputs = model.prepare_inputs_for_generation(ids, next_sequence_length=1, **model_kwargs)
        if full or answer.waiting >= ahead:
            question = answer.question(ids)
            if goes_on and not full:  # the device need not wait for the host to hear
                outputs = step(**inputs, return_dict=True)
            surplus = answer.hear(*question)
            if full or surplus is not None:
                surplus = surplus or 0
                if fed := surplus + (outputs is not None):
                    _take_back(cache, fed)
                if inputs and outputs is None:
                    cache.settle()  # what was prepared does not come
                answer.end(surplus)
                return ids[:, : ids.shape[1] - surplus]
            room = _revocable(cache) if answer.foreseen else 0
            goes_on, ahead = room > 1, max(1, min(ask_every, room - 1))
        if outputs is None:
            outputs = step(**inputs, return_dict=True)


def _take_back(cache: TieredKVCache, tokens: int) -> None:
    """Forget the newest tokens, as if they had never come."""
    cache.crop(-tokens)
    for layer in cache.tiered:
        layer.known.ranked_at += tokens  # a crop goes on counting them


class _Answer:
    """The tokens that are chosen, and what is known of the answer's end.

    Attributes:
        scores: processed scores ``[B, V]`` of each token, if they were asked for.
        logits: the model's logits ``[B, V]`` of each token, likewise.
        unasked: of each token that the host has not asked about, whether all rows have ended, bool scalars.
        foreseen: whether tokens after the end may be chosen and dropped: everybody who sees them is transformers' own, or
            ``looks_ahead``.
    """

    def __init__(
        self,
        config: GenerationConfig,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        streamer: Any,
    ) -> None:
        self.config, self.processors = config, logits_processor
        self.criteria, self.streamer = stopping_criteria, streamer
        kept = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if kept and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if kept and config.output_logits else None
        self.unasked: list[Tensor] = []
        self.foreseen = all(map(_looks_ahead, (*logits_processor, *stopping_criteria)))
        self._pads = any(hasattr(x, "eos_token_id") for x in stopping_criteria)
        self._only_length = all(type(x) is MaxLengthCriteria for x in stopping_criteria)
        self._length = stopping_criteria.max_length
        self._unfinished: Tensor | None = None
        self._streamed = 0

    def extend(self, ids: Tensor, logits: Tensor) -> Tensor:
        """``ids`` ``[B, T]`` and the token that follows by the model's logits ``[B, Q, V]``."""
        newest = logits[:, -1].to(copy=True, dtype=torch.float32, device=ids.device)
        scores = self.processors(ids, newest)
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (newest,)
        if self.config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if self._unfinished is None:
            self._unfinished = torch.ones_like(tokens)
        if self._pads:
            padding = self.config._pad_token_tensor.to(ids.device)
            tokens = tokens * self._unfinished + padding * (1 - self._unfinished)
        ids = torch.cat([ids, tokens[:, None]], 1)
        if not self._only_length:
            self._unfinished = self._unfinished & ~self.criteria(ids, self.scores)
            self.unasked.append(self._unfinished.amax() == 0)
        self._streamed += 1
        return ids

    @property
    def waiting(self) -> int:
        """Tokens that the host has not looked at, and somebody waits for."""
        return max(len(self.unasked), 0 if self.streamer is None else self._streamed)

    def full(self, ids: Tensor) -> bool:
        """Whether the answer ends here whatever it says."""
        return self._length is not None and ids.shape[1] >= self._length

    def question(self, ids: Tensor) -> tuple[int, Callable[[], list[Tensor]]]:
        """Ask what has become of the tokens that nobody has looked at; ``hear`` takes the result."""
        asked = torch.stack(self.unasked) if self.unasked else torch.zeros(0, dtype=torch.bool, device=ids.device)
        new, self._streamed = (0 if self.streamer is None else self._streamed), 0
        self.unasked.clear()
        return new, fetched([asked, ids[:, ids.shape[1] - new :]])

    def hear(self, new: int, answered: Callable[[], list[Tensor]]) -> int | None:
        """Tokens that came after the end; ``None`` if it has not come. The ``new`` ones before it are streamed."""
        asked, tokens = answered()
        ended = asked.nonzero().flatten().tolist()
        surplus = len(asked) - 1 - ended[0] if ended else 0
        for token in tokens[:, : new - surplus].unbind(1) if new else ():
            self.streamer.put(token)
        return surplus if ended else None

    def end(self, surplus: int) -> None:
        """The answer is complete without its last ``surplus`` tokens."""
        if surplus:
            self.scores, self.logits = (x if x is None else x[:-surplus] for x in (self.scores, self.logits))
        if self.streamer is not None:
            self.streamer.end()


def _looks_ahead(one: Any) -> bool:
    """Whether a processor or a stopping criterion may see tokens that are dropped again: it keeps nothing of them."""
    return bool(getattr(one, "looks_ahead", type(one).__module__.startswith("transformers.")))


def _revocable(cache: TieredKVCache) -> int:
    """Tokens that may come and be taken back again so that nobody can tell."""
    layers = cache.tiered
    if len(layers) < len(cache.layers) or any(layer.plan.observes for layer in layers):
        return 0
    return min(layer.steps.before_move(layer.known) for layer in layers)


@contextlib.contextmanager
def _steps_of_fixed_shape(cache: TieredKVCache, wanted: bool) -> Iterator[None]:
    """Inside the block, a cache that grows takes steps as one with ``max_cache_len`` does."""
    growing = wanted and not cache.compile_refusal and not cache.is_compileable
    if growing:
        cache.enable_compile()
    try:
        yield
    finally:
        if growing:
            cache.disable_compile()


def _refusal(model: PreTrainedModel, config: GenerationConfig, synced_gpus: bool, model_kwargs: dict[str, Any]) -> str:
    """Why ``generate``'s own loop has to do it; empty if it need not."""
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        return f"{mode.value.replace('_', ' ')} is not among the modes it knows (greedy search and sampling)"
    cache = model_kwargs.get("past_key_values")
    if not isinstance(cache, TieredKVCache):
        return f"the cache is a {type(cache).__name__}, not a TieredKVCache"
    if model.config.is_encoder_decoder:
        return "the model has an encoder"
    if synced_gpus or generation.is_fsdp_managed_module(model) or generation.is_deepspeed_zero3_enabled():
        return "several GPUs step together (synced_gpus, FSDP, ZeRO-3)"
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        return "the model lies on several devices"
    if not config.use_cache:
        return "use_cache is off"
    if config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states):
        return "attention weights or hidden states were asked for"
    return ""


def _asked_of_generate() -> dict[str, Any]:
    """What ``generate``, which calls the loop, was asked for; empty if something else does.

    transformers (5.23) hands a custom loop neither the assistant model nor the streamer, which has been told the prompt by
    then: a reader would wait for ever.
    """
    frame = sys._getframe(2)
    for _ in range(4):  # whoever wraps the loop stands between
        if frame.f_code.co_name == "generate" and "streamer" in frame.f_locals:
            return dict(frame.f_locals)
        if frame.f_back is None:
            break
        frame = frame.f_back
    return {}
