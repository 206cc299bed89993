"""The doors through which a quantizer sees the model that it serves."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import pytest
from tiny import tiny_llama

from fade_core import FadeConfig, create_tiered_cache
from fade_core.errors import CheckpointError
from fade_core.interfaces import Quantizer, QuantizerConfig, QuantizerContext
from fade_core.quantizers.uniform import UniformConfig


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
