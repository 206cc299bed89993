"""Which layers deserve more bits: the divergence that each layer causes when it alone is compressed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fade_core import FadeConfig
from fade_core.cache.named_caches import opened, tiered_factory
from fade_core.errors import InputError
from fade_eval.kl import DivergenceResult, Steps, compare, run_exact, summarise, text_batches
from fade_eval.progress import Progress, Units
from fade_eval.results import EvalResult
from fade_eval.tokens import Texts, check_counts

EXACT_LADDER = ({"tier": "fp16"},)


@dataclass(frozen=True)
class LayerSensitivity(EvalResult):
    """What one layer causes when all others are exact; figures as in ``DivergenceResult``.

    Attributes:
        layer: index in the model.
        share: of the sum of ``kl_mean`` over the layers.
    """

    layer: int
    kl_mean: float
    kl_standard_error: float | None
    kl_p99: float
    top1_agreement: float
    share: float


@dataclass(frozen=True)
class SensitivityResult(EvalResult):
    """Every layer that is compressed, in the model's order.

    Attributes:
        layers: one a layer of full attention.
        together: all of them compressed, as the configuration says, without its budget.
        num_layers: layers of the model, those included that are not compressed.
    """

    layers: tuple[LayerSensitivity, ...]
    together: DivergenceResult
    num_layers: int

    @property
    def ranked(self) -> tuple[LayerSensitivity, ...]:
        """The layers, the one that costs most first."""
        return tuple(sorted(self.layers, key=lambda layer: layer.kl_mean, reverse=True))

    @property
    def sum(self) -> float:
        """Sum of the layers' mean divergences: close to ``together.kl_mean`` where errors do not compound."""
        return sum(layer.kl_mean for layer in self.layers)


def sensitivity(
    model: Any,
    config: FadeConfig,
    texts: Texts = None,
    *,
    tokenizer: Any = None,
    prompt_tokens: int = 1024,
    steps: int = 64,
    max_texts: int | None = None,
    steps_per_forward: int = 1,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> SensitivityResult:
    """Compress one layer at a time, all others in full precision, and compare each with the exact cache.

    One layer alone is measured against nothing but the exact cache. Leaving one layer out of a compressed cache
    instead would make its cost the small difference of two large divergences.

    What is measured is precision and the layer's own ladder. ``policy.budget`` would evict in every layer alike and is
    left out.

    Args:
        model: a causal language model in evaluation mode.
        config: what each layer is compressed with, its overrides in ``layers`` included.
        texts: one or several, as strings or token ids; ``None`` for the shipped evaluation texts.
        tokenizer: needed if the texts are strings.
        prompt_tokens: tokens fed at once.
        steps: tokens fed one by one after it, which are what is measured.
        max_texts: take only so many texts.
        steps_per_forward: tokens a forward pass after the prompt.
        batch_size: texts decoded side by side.
        progress: called as steps are done.

    Raises:
        InputError: if a text is too short, a number does not make sense, or nothing would be compressed.
        ConfigError: if the configuration does not fit the model.
    """
    check_counts(prompt_tokens=prompt_tokens, steps=steps, steps_per_forward=steps_per_forward, batch_size=batch_size)
    kept = config.n_sink + config.recent_window
    if prompt_tokens + steps <= kept:
        raise InputError(
            f"prompt_tokens={prompt_tokens} and steps={steps} fit into sinks and window ({kept} tokens), so that nothing "
            f"would be compressed; give a longer prompt"
        )
    batches = text_batches(texts, tokenizer, prompt_tokens + steps + 1, model.device, max_texts, batch_size)
    tiered, num_layers = compressed_layers(model, config)
    configs = {layer: alone(config, layer, num_layers) for layer in tiered} | {None: _without_budget(config)}
    measured: dict[int | None, list[Steps]] = {layer: [] for layer in configs}
    advance = Units(sum(map(len, batches)) * steps * (len(configs) + 1), progress)
    for batch in batches:
        run = run_exact(model, batch, prompt_tokens, steps_per_forward=steps_per_forward, advance=advance)
        for layer, own in configs.items():
            factory = tiered_factory(own)
            measured[layer] += compare(model, factory, run, steps_per_forward=steps_per_forward, advance=advance)
    together = summarise(measured.pop(None), prompt_tokens, steps)
    found = {layer: summarise(each, prompt_tokens, steps) for layer, each in measured.items() if layer is not None}
    return SensitivityResult(_rows(found), together, num_layers)


def compressed_layers(model: Any, config: FadeConfig) -> tuple[Sequence[int], int]:
    """Indices of the layers that a cache of ``config`` compresses on ``model``, and the number of all layers."""
    with opened(tiered_factory(_without_budget(config)), model) as cache:
        return [layer.plan.index for layer in cache.tiered], len(cache.layers)


def alone(config: FadeConfig, layer: int, num_layers: int) -> FadeConfig:
    """``config`` in one layer, full precision in all others. Errors as ``FadeConfig.for_layer``."""
    others = [f":{layer}"] * (layer > 0) + [f"{layer + 1}:"] * (layer < num_layers - 1)
    own = _without_budget(config.for_layer(layer, num_layers))
    return own.with_overrides(layers={key: {"ladder": EXACT_LADDER} for key in others})


def _without_budget(config: FadeConfig) -> FadeConfig:
    unbounded = {} if config.policy.budget is None else {"policy": {"budget": None, "schedule": None}}
    return config.with_overrides(telemetry=(), **unbounded)


def _rows(found: dict[int, DivergenceResult]) -> tuple[LayerSensitivity, ...]:
    total = sum(result.kl_mean for result in found.values())
    return tuple(
        LayerSensitivity(
            layer=layer,
            kl_mean=result.kl_mean,
            kl_standard_error=result.kl_standard_error,
            kl_p99=result.kl_p99,
            top1_agreement=result.top1_agreement,
            share=result.kl_mean / total if total else 0.0,
        )
        for layer, result in found.items()
    )
