"""The doors through which a quantizer, or a policy, sees the model that it serves."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
import torch
from tiny import fresh_seed, tiny_llama

from fade_core import FadeConfig, attach_telemetry, create_tiered_cache
from fade_core.builtin.policies.h2o import H2OPolicy
from fade_core.builtin.quantizers.uniform import UniformConfig, UniformQuantizer
from fade_core.cache import layer_steps
from fade_core.errors import CheckpointError, NonFiniteError
from fade_core.interfaces import (
    Event,
    EvictionPolicy,
    PolicyConfig,
    PromptView,
    Quantizer,
    QuantizerConfig,
    QuantizerContext,
    TelemetrySink,
)
from fade_core.ops.step import take_in


class PickyConfig(QuantizerConfig):
    """Uniform codes for models of at most ``layers`` layers."""

    kind: Literal["picky"] = "picky"
    layers: int = 3
    asked: ClassVar[list[Any]] = []

    def check_model(self, model: Any) -> None:
        self.asked.append(model)
        if model.config.num_hidden_layers > self.layers:
            raise CheckpointError(f"made for {self.layers} layers")

    def build(self, context: QuantizerContext) -> Quantizer:
        return UniformConfig(bits=self.bits).build(context)


@pytest.fixture(autouse=True)
def nobody_asked() -> None:
    PickyConfig.asked.clear()


def test_each_configuration_checks_the_model_once_a_cache() -> None:
    model = tiny_llama(layers=3)
    config = FadeConfig(keys=PickyConfig(bits=4), values=PickyConfig(bits=2))
    create_tiered_cache(model, config).detach()
    assert PickyConfig.asked == [model, model]


def test_a_model_that_is_refused_keeps_its_attention() -> None:
    model = tiny_llama(layers=4)
    before = model.config._attn_implementation
    for config in (
        FadeConfig(keys=PickyConfig()),
        FadeConfig(layers={"-1": {"values": PickyConfig()}}),
        FadeConfig(ladder=[{"tier": "int4", "capacity": 64}, {"tier": "int2", "values": PickyConfig()}]),
    ):
        with pytest.raises(CheckpointError, match="made for 3 layers"):
            create_tiered_cache(model, config)
    assert model.config._attn_implementation == before


class PickyPolicyConfig(PolicyConfig):
    """H2O for models of at most two layers."""

    kind: Literal["picky"] = "picky"

    def check_model(self, model: Any) -> None:
        if model.config.num_hidden_layers > 2:
            raise CheckpointError("trained on 2 layers")

    def build(self) -> EvictionPolicy:
        return H2OPolicy()


def test_a_policy_checks_the_model_too() -> None:
    config = FadeConfig(policy=PickyPolicyConfig(budget=0.5))
    create_tiered_cache(tiny_llama(layers=2), config).detach()
    model = tiny_llama(layers=3)
    before = model.config._attn_implementation
    with pytest.raises(CheckpointError, match="trained on 2 layers"):
        create_tiered_cache(model, config)
    assert model.config._attn_implementation == before


class Pupil(UniformQuantizer):
    """Uniform codes that keep what the prompt's attention comes to (a test may; a quantizer must not keep the view)."""

    kind: ClassVar[str] = "pupil"
    learns: ClassVar[bool] = True

    def __init__(self, context: QuantizerContext) -> None:
        side = "token" if context.side == "key" else "channel"
        super().__init__(context.head_dim, 4, layout=side)
        self.seen: list[dict[str, Any]] = []
        self.forgotten = 0

    def observe(self, prompt: PromptView) -> None:
        self.shortcoming = "" if prompt.keys.shape[2] >= 100 else "too short a prompt"
        outputs = prompt.once("outputs", lambda: attention_of(prompt))
        self.seen.append({"outputs": outputs, "view": prompt})

    def forget(self) -> None:
        self.forgotten += 1
        self.seen.clear()
        self.shortcoming = "no prompt"


class PupilConfig(QuantizerConfig):
    kind: Literal["pupil"] = "pupil"

    def build(self, context: QuantizerContext) -> Quantizer:
        return Pupil(context)


class Listener(TelemetrySink):
    """Keeps the events."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def attention_of(prompt: PromptView) -> torch.Tensor:
    """Outputs ``[B, Q, H_q * D]`` of the layer's heads, from the view alone."""
    groups = prompt.queries.shape[1] // prompt.keys.shape[1]
    keys, values = (t.repeat_interleave(groups, 1) for t in (prompt.keys, prompt.values))
    logits = prompt.queries @ keys.transpose(-1, -2) * prompt.scaling
    seen = prompt.visible(slice(0, prompt.queries.shape[2]))
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0)
    return (weights @ values).transpose(1, 2).flatten(2)


def pupils(cache: Any) -> list[Pupil]:
    tiers = [tier for layer in cache.tiered for tier in layer.plan.ladder.tiers]
    return [quantizer for tier in tiers for quantizer in (tier.keys, tier.values)]


@pytest.fixture
def watched() -> tuple[Any, dict[int, torch.Tensor]]:
    """A model, and the newest input of each layer's output projection."""
    model = tiny_llama(fresh_seed(), layers=2)
    inputs: dict[int, torch.Tensor] = {}
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, args, index=index: inputs.update({index: args[0]}))
    return model, inputs


PUPILS: dict[str, Any] = {"n_sink": 4, "recent_window": 32, "keys": PupilConfig(), "values": PupilConfig()}


@pytest.mark.parametrize("padding", [0, 41])
def test_a_prompt_is_shown_as_the_model_attended_to_it(watched: Any, padding: int) -> None:
    model, inputs = watched
    ids = torch.randint(1, 255, (2, 150))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    with create_tiered_cache(model, FadeConfig(**PUPILS)) as cache, torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        for index, layer in enumerate(cache.tiered):
            keys, values = pupils(cache)[2 * index : 2 * index + 2]
            (shown,) = keys.seen
            torch.testing.assert_close(shown["outputs"][mask.bool()], inputs[index][mask.bool()])
            assert shown["view"].module is model.model.layers[index].self_attn
            assert (shown["view"].layer, shown["view"].n_sink, shown["view"].recent_window) == (index, 4, 32)
            assert values.seen[0]["outputs"] is shown["outputs"]  # computed once for both sides
            assert layer.held.stores[0].tiles


def test_it_is_shown_again_until_something_is_encoded_and_after_a_reset(watched: Any) -> None:
    model, inputs = watched
    ids = torch.randint(1, 255, (1, 400))
    listener = Listener()
    events = listener.events
    with create_tiered_cache(model, FadeConfig(**PUPILS)) as cache, torch.no_grad():
        attach_telemetry(cache, listener)
        for turn in range(2):
            model(ids[:, :40], past_key_values=cache)
            model(ids[:, 40:90], past_key_values=cache)
            keys = pupils(cache)[0]
            assert keys.forgotten == turn + 1 and len(keys.seen) == 2
            assert [tuple(s["view"].queries.shape[2:]) for s in keys.seen] == [(40, 16), (50, 16)]
            assert keys.seen[1]["view"].keys.shape[2] == 90
            torch.testing.assert_close(keys.seen[1]["outputs"], inputs[0])
            assert not cache.tiered[0].held.stores[0].tiles and not events
            model(ids[:, 90:300], past_key_values=cache)
            assert cache.tiered[0].held.stores[0].tiles and len(keys.seen) == 3
            model(ids[:, 300:], past_key_values=cache)
            assert len(keys.seen) == 3  # what is encoded has to be read back
            assert not any(event.kind == "fallback" for event in events)
            cache.reset()
            events.clear()


def test_a_shortcoming_is_told_once_a_layer_when_tokens_are_encoded(watched: Any) -> None:
    model, _ = watched
    listener = Listener()
    events = listener.events
    with create_tiered_cache(model, FadeConfig(**PUPILS)) as cache, torch.no_grad():
        attach_telemetry(cache, listener)
        model(torch.randint(1, 255, (1, 90)), past_key_values=cache)
        assert not events
        for _ in range(40):
            model(torch.randint(1, 255, (1, 1)), past_key_values=cache)
    told = [event for event in events if event.kind == "fallback"]
    assert [event.layer for event in told] == [0, 1]
    assert told[0].detail == {"op": "encode", "quantizer": "pupil", "reason": "too short a prompt"}


def test_a_quantizer_that_learns_nothing_costs_nothing(watched: Any) -> None:
    model, _ = watched
    with create_tiered_cache(model, FadeConfig(n_sink=4, recent_window=32)) as cache:
        assert not any(layer.plan.learners for layer in cache.tiered)


@pytest.mark.parametrize(("sides", "steps"), [(PUPILS, 1), ({"n_sink": 4, "recent_window": 32}, 4)])
def test_what_is_undone_by_the_prompt_is_warmed_up_once_in_a_process(
    watched: Any, monkeypatch: pytest.MonkeyPatch, sides: dict[str, Any], steps: int
) -> None:
    """A rotation that a quantizer keeps is each layer's own; one that learns is another after every prompt."""
    model, _ = watched
    taken: list[Any] = []
    monkeypatch.setattr(layer_steps, "_warm", set())
    monkeypatch.setattr(layer_steps, "take_in", lambda *args: taken.append(args) or take_in(*args))
    for _ in range(2):
        with create_tiered_cache(model, FadeConfig(**sides), max_cache_len=200) as cache:
            for layer in cache.tiered:
                layer.lazy_initialization(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16))
                layer.steps.warm_up(layer.held)
                assert layer.logical == 0 and not layer.held.window.lengths.any()
    assert len(taken) == steps


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("mode", ["raise", "zero"])
def test_what_is_not_finite_is_found_before_anything_is_stored(layer: int, mode: str) -> None:
    """As where tokens lie on a GPU: layers ask, and read the answer when attention to the prompt is under way."""
    model = tiny_llama(fresh_seed(), layers=3)
    ids = torch.randint(1, 255, (2, 150))
    projection = model.model.layers[layer].self_attn.v_proj

    def spoil(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.clone()
        output[1, 70, 3] = torch.nan
        return output

    with create_tiered_cache(model, FadeConfig(**PUPILS, on_nonfinite=mode)) as cache, torch.no_grad():
        listener = Listener()
        attach_telemetry(cache, listener)
        cache.tiered[0].plan.finite.deferred = True  # shared by the layers
        hook = projection.register_forward_hook(spoil)
        if mode == "raise":
            where = (
                f"layer {layer}: NaN or infinity in the values at position 70 of row 1 .*The cache is as it was before"
            )
            with pytest.raises(NonFiniteError, match=where):
                model(ids, past_key_values=cache)
            assert [(event.kind, event.layer) for event in listener.events][-1] == ("rollback", layer)
            assert cache.get_seq_length() == 0 and not any(one.is_initialized for one in cache.tiered)
        else:
            model(ids, past_key_values=cache)
            assert all(one.held.stores[0].tiles for one in cache.tiered)
            cache.reset()
        hook.remove()
        found = model(ids, past_key_values=cache).logits
        assert cache.get_seq_length() == 150 and cache.tiered[layer].held.stores[0].tiles
    with create_tiered_cache(model, FadeConfig(**PUPILS)) as plain, torch.no_grad():
        assert torch.equal(model(ids, past_key_values=plain).logits, found)
