"""No field is dead: each changes what a real cache does with a real model's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from plugin_maker import provider
from tiny import fresh_seed, tiny_llama

from fade_core import FadeConfig, create_tiered_cache
from fade_core.cache.inspection import dense
from fade_core.errors import NonFiniteError
from fade_core.interfaces import RopeConfig, RopeScheme
from fade_core.ops.reference import TorchDecodeAttention
from fade_core.plugins import Registry, use_registry

PROMPT, STEPS, LAYERS = 316, 24, 3  # the eighth step fills a tile of 64
H2O = {"kind": "h2o", "budget": 0.5}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(layers=LAYERS)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(1, 255, (1, PROMPT + STEPS), generator=torch.Generator().manual_seed(fresh_seed()))


def filled(model: Any, tokens: torch.Tensor, **fields: Any) -> Any:
    """A detached cache that has seen the prompt at once and the rest token by token."""
    cache = create_tiered_cache(model, config=FadeConfig(**fields))
    with cache, torch.no_grad():
        model(tokens[:, :PROMPT], past_key_values=cache)
        for place in range(PROMPT, tokens.shape[1]):
            model(tokens[:, place : place + 1], past_key_values=cache)
    return cache


def places(cache: Any, layer: int = 0) -> torch.Tensor:
    """Rung of each token of the first row and head: 0 full precision, -1 evicted."""
    found: torch.Tensor = cache.layers[layer].held.tier_map()[0, 0]
    return found


def error(cache: Any, exact: Any, side: str, layer: int = 0) -> float:
    """Mean absolute difference of what is stored from the exact tokens of the first layer."""
    difference = dense(cache.layers[layer].held, side) - dense(exact.layers[layer].held, side)
    return float(difference.abs().mean())


def rungs(cache: Any, layer: int = 0) -> list[str]:
    return [store.tier.name for store in cache.layers[layer].held.stores]


@pytest.fixture(scope="module")
def default(model: Any, tokens: torch.Tensor) -> Any:
    return filled(model, tokens)


@pytest.fixture(scope="module")
def exact(model: Any, tokens: torch.Tensor) -> Any:
    return filled(model, tokens, ladder=[{"tier": "fp16"}])


def test_n_sink(model: Any, tokens: torch.Tensor, default: Any) -> None:
    assert places(default)[:10].tolist() == [0] * 4 + [1] * 6
    assert places(filled(model, tokens, n_sink=9))[:10].tolist() == [0] * 9 + [1]
    assert places(filled(model, tokens, n_sink=0))[0] == 1


def test_recent_window(model: Any, tokens: torch.Tensor, default: Any) -> None:
    for cache, window in ((default, 64), (filled(model, tokens, recent_window=130), 130)):
        assert places(cache)[-window:].tolist() == [0] * window
        assert int((places(cache) == 0).sum()) < 4 + window + 64


def test_tile(model: Any, tokens: torch.Tensor, default: Any) -> None:
    for cache, tile in ((default, 64), (filled(model, tokens, tile=16), 16)):
        assert int((places(cache) == 0).sum()) < 4 + 64 + tile
        assert int((places(cache) == 1).sum()) % tile == 0


@pytest.mark.parametrize(("side", "field"), [("key", "keys"), ("value", "values")])
def test_keys_and_values(model: Any, tokens: torch.Tensor, default: Any, exact: Any, side: str, field: str) -> None:
    fine = filled(model, tokens, **{field: {"kind": "uniform", "bits": 8, "axis": "channel"}})
    assert error(fine, exact, side) < error(default, exact, side) / 8
    assert fine.memory_report().total > default.memory_report().total


def test_ladder(model: Any, tokens: torch.Tensor) -> None:
    ladder = [{"tier": "int4", "capacity": 128}, {"tier": "int2", "capacity": 64}]
    cache = filled(model, tokens, ladder=ladder, policy={"kind": "position", "every": 1})
    assert rungs(cache) == ["int4", "int2"]
    found = places(cache)
    assert [int((found == rung).sum()) for rung in (1, 2)] == [128, 64]
    assert int((found == -1).sum()) > 0
    ladder = [{"tier": "int4", "capacity": 0.25}, {"tier": "int2"}]
    rest = places(filled(model, tokens, ladder=ladder, policy={"kind": "position", "every": 1}))
    assert int((rest == 1).sum()) == 64
    assert int((rest == -1).sum()) == 0


def test_policy(model: Any, tokens: torch.Tensor) -> None:
    held = {}
    for kind in ("position", "h2o", "ema"):
        found = places(filled(model, tokens, tile=16, policy={"kind": kind, "budget": 0.5, "every": 16}))
        assert int((found >= 0).sum()) <= PROMPT // 2 + STEPS // 2 + 64  # the share, and what waits in the window
        held[kind] = found.clamp(-1, 0).tolist()
    assert held["position"][4:20] == [-1] * 16
    assert len({tuple(found) for found in held.values()}) == 3


def test_policy_every(model: Any, tokens: torch.Tensor) -> None:
    def ranked(every: int) -> list[int]:
        ladder = [{"tier": "int4", "capacity": 0.25}, {"tier": "int2"}]
        policy = {"kind": "ema", "every": every, "decay": 0.5}
        found: list[int] = places(filled(model, tokens, tile=16, ladder=ladder, policy=policy)).tolist()
        return found

    assert ranked(1000) != ranked(8)


def test_observation_window(model: Any, tokens: torch.Tensor) -> None:
    def mass(window: int | str) -> float:
        cache = create_tiered_cache(model, config=FadeConfig(policy=H2O, observation_window=window))
        with cache, torch.no_grad():
            model(tokens[:, :PROMPT], past_key_values=cache)
        cache.layers[0].settle()
        return float(cache.layers[0].held.statistics()[-1]["seen"].max())

    assert [mass(window) for window in (1, 20, "all")] == [1, 20, PROMPT]


def test_kernel(model: Any, tokens: torch.Tensor) -> None:
    class Counting(TorchDecodeAttention):
        name: ClassVar[str] = "counting"
        priority: ClassVar[int] = -1
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            Counting.calls += 1
            return super().__call__(*args, **kwargs)

    with use_registry(Registry([provider("counting", "kernels", Counting)], entry_points=False)):
        filled(model, tokens)
        assert Counting.calls == 0
        for field in ("kind", "decode_attention"):
            Counting.calls = 0
            filled(model, tokens, kernel={field: "counting"})
            assert Counting.calls >= STEPS * LAYERS


def test_layers(model: Any, tokens: torch.Tensor, default: Any, exact: Any) -> None:
    eight = {"kind": "uniform", "bits": 8, "axis": "channel"}
    cache = filled(model, tokens, layers={"0": {"keys": eight}, "-1": {"recent_window": 130}})
    assert [rungs(cache, layer) for layer in range(LAYERS)] == [["k8v4"], ["int4"], ["int4"]]
    assert error(cache, exact, "key") < error(default, exact, "key") / 8
    assert [int(places(cache, layer)[-130]) for layer in range(LAYERS)] == [1, 1, 0]


def test_attention(model: Any) -> None:
    before = model.config._attn_implementation
    modes = {}
    for attention in ("auto", "fade", "stock"):
        with create_tiered_cache(model, config=FadeConfig(attention=attention)) as cache:
            modes[attention] = (cache.attention, cache.attached)
    assert modes == {"auto": ("fade", True), "fade": ("fade", True), "stock": ("stock", False)}
    assert model.config._attn_implementation == before


def test_on_nonfinite(model: Any) -> None:
    states = torch.randn(1, 2, 5, 16, generator=torch.Generator().manual_seed(fresh_seed()))
    broken = states.clone()
    broken[0, 1, 3, 7] = torch.nan
    with create_tiered_cache(model, config=FadeConfig()) as cache, pytest.raises(NonFiniteError):
        cache.update(broken, states, 0)
    with create_tiered_cache(model, config=FadeConfig(on_nonfinite="zero")) as cache:
        cache.update(broken, states, 0)
        assert torch.equal(dense(cache.layers[0].held, "key", cache.layers[0].pending), broken.nan_to_num(0.0))


class Turning(RopeScheme):
    """Llama's embedding, to be turned ``times`` times as far."""

    kind = "turning"

    def __init__(self, times: int) -> None:
        self.times = times

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        half = x.shape[-1] // 2
        angle = self.times * positions[..., None] * 10_000.0 ** (-torch.arange(half) / half)
        first, second = x[..., :half], x[..., half:]
        return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], -1)

    def unrotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.rotate(x, -positions)


class AutoTurning(RopeConfig):
    kind: Literal["auto"] = "auto"

    def build(self, model_config: Any, layer_idx: int | None = None) -> RopeScheme:
        return Turning(1)


class Twice(RopeConfig):
    kind: Literal["twice"] = "twice"

    def build(self, model_config: Any, layer_idx: int | None = None) -> RopeScheme:
        return Turning(2)


def logits_after_eviction(model: Any, tokens: torch.Tensor, **fields: Any) -> torch.Tensor:
    """Of the last token, by a model of one layer's depth that has evicted most of what came before."""
    policy = {"kind": "position", "budget": 100, "every": 1}
    with use_registry(Registry([provider("turning", "rope_schemes", AutoTurning, Twice)], entry_points=False)):
        cache = create_tiered_cache(model, config=FadeConfig(policy=policy, **fields))
        with cache, torch.no_grad():
            model(tokens[:, :PROMPT], past_key_values=cache)
            found: torch.Tensor = model(tokens[:, PROMPT : PROMPT + 1], past_key_values=cache).logits[0, -1]
    assert int((places(cache) < 0).sum()) > 100
    return found


def test_reposition(tokens: torch.Tensor) -> None:
    model = tiny_llama(layers=1)
    kept, together = (logits_after_eviction(model, tokens, reposition=mode) for mode in ("keep", "contiguous"))
    assert not torch.allclose(kept, together, atol=1e-3)
    assert torch.equal(kept, logits_after_eviction(model, tokens))


def test_rope(tokens: torch.Tensor) -> None:
    model = tiny_llama(layers=1)
    found = {
        kind: logits_after_eviction(model, tokens, reposition="contiguous", rope=rope)
        for kind, rope in (("read", None), ("auto", {"kind": "auto"}), ("twice", {"kind": "twice"}))
    }
    assert torch.equal(found["read"], found["auto"])
    assert not torch.allclose(found["read"], found["twice"], atol=1e-3)


def test_telemetry(model: Any, tokens: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    filled(model, tokens, telemetry=[{"kind": "jsonl", "path": str(path)}])
    assert '"kind": "encode"' in path.read_text()


def test_every_field_is_tested_here() -> None:
    for name in FadeConfig.model_fields:
        tested = "keys_and_values" if name in ("keys", "values") else name
        assert f"test_{tested}" in globals()
