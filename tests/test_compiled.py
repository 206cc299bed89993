"""Decode steps of a fixed cache compile: one graph, compiled once, no host read, addresses for good."""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_fixed_evicting import EVICTING
from test_modes import FAMILIES, PACKED, model_of
from test_zoo import FAMILIES as ZOO
from test_zoo import STOCK
from tinymodels import fresh_seed, left_padded, prompt, tiny
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.errors import InputError

CONFIG = PACKED["channel_keys"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class NoHostRead(TorchDispatchMode):
    """Fails where a tensor is read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError(f"{func} reads a tensor on the host")
        return func(*args, **kwargs or {})


def compiling(name: str, graphs: list[torch.fx.GraphModule]) -> CompileConfig:
    """Settings with which ``generate`` compiles on a CPU; graphs that are compiled go into ``graphs``."""

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return lookup_backend(name)(graph, inputs)

    config = CompileConfig(fullgraph=True, dynamic=None, backend=backend, mode=None)
    config._compile_all_devices = True
    return config


def generate(
    model: PreTrainedModel, cache: TieredKVCache, inputs: dict[str, Tensor], new: int, **options: Any
) -> Tensor:
    settings: dict[str, Any] = {"do_sample": False, "min_new_tokens": new} | options
    out: Tensor = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **settings)
    return out


def rows() -> dict[str, Tensor]:
    return left_padded([prompt(i, length)[0] for i, length in enumerate((33, 50, 21))])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma3_text"])
def test_generate_compiles_one_graph_for_200_tokens(family: str, backend: str) -> None:
    model, inputs = model_of(family), rows()
    with create_tiered_cache(model, CONFIG) as growing:
        wanted = generate(model, growing, inputs, 200)
    graphs: list[torch.fx.GraphModule] = []
    with (
        create_tiered_cache(model, CONFIG, max_cache_len=400) as cache,
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        found = generate(model, cache, inputs, 200, compile_config=compiling(backend, graphs))
        assert torch.equal(found, wanted)
        assert len(graphs) == 1
        assert cache.get_seq_length() == growing.get_seq_length()


@pytest.mark.parametrize("name", ["ema, whole tiles", "h2o", "position"])
def test_tokens_are_evicted_between_the_replays_of_one_graph(name: str) -> None:
    """Tokens, tiers and statistics are those of the growing cache; within the graph nothing is read back."""
    model, inputs, graphs = model_of("qwen3"), rows(), list[torch.fx.GraphModule]()

    def unread(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)

        def run(*args: Any) -> Any:
            with NoHostRead():
                return graph(*args)

        return run

    settings = CompileConfig(fullgraph=True, dynamic=None, backend=unread, mode=None)
    settings._compile_all_devices = True
    config = EVICTING[name]
    with create_tiered_cache(model, config) as growing:
        wanted = generate(model, growing, inputs, 80)
    places: list[int] = []
    with (
        create_tiered_cache(model, config, max_cache_len=400) as cache,
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        for _ in range(2):  # again after reset, in the same buffers
            found = generate(model, cache, inputs, 80, compile_config=settings)
            places = places or addresses(cache)
            assert torch.equal(found, wanted)
            assert addresses(cache) == places
            for mine, theirs in zip(cache.tiered, growing.tiered, strict=True):
                mine.settle()
                assert mine.logical == theirs.logical
                assert torch.equal(mine.tier_map(), theirs.tier_map())
                for statistic, held in mine.statistics()[0].items():
                    live = theirs.stores[0].positions() >= 0
                    torch.testing.assert_close(
                        held[live], theirs.statistics()[0][statistic][live], rtol=1e-4, atol=1e-5
                    )
            cache.reset()
    assert len(graphs) == 1


@torch.no_grad()
def test_a_cache_that_is_not_asked_between_steps_says_so() -> None:
    model, config = model_of("llama"), EVICTING["position"].with_overrides(tile=64)
    forward = torch.compile(model, backend="eager", fullgraph=True)
    with create_tiered_cache(model, config, max_cache_len=4000) as cache:
        model(prompt(1, 300), past_key_values=cache, use_cache=True)
        layer = cache.tiered[0]
        tiles = layer._parts()[1].max_tiles
        assert tiles * 64 < 1300  # room for what is kept and what may come, not for all
        inputs = step_inputs(cache, prompt(2, 1)) | {"position_ids": torch.full((1, 1), 300)}
        layer._used.fill_(tiles - 1)
        layer._stores_now[0].occupy(torch.full_like(layer._stores_now[0].per_head, tiles - 1))
        for _ in range(70 + 64):
            forward(**inputs, past_key_values=cache, use_cache=True)
        with pytest.raises(InputError, match=r"compiled steps went by and nothing was evicted; .* get_mask_sizes"):
            cache.memory_report()


ROTATED = FadeConfig(n_sink=4, recent_window=16, tile=16, keys={"kind": "rotated"}, values={"kind": "rotated"})


@pytest.mark.parametrize("config", [CONFIG, ROTATED], ids=["uniform", "rotated"])
def test_the_next_cache_of_the_same_shape_runs_the_same_graph(config: FadeConfig) -> None:
    model, inputs, graphs = model_of("llama"), rows(), list[torch.fx.GraphModule]()
    settings = compiling("eager", graphs)
    found = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            with create_tiered_cache(model, config, max_cache_len=200) as cache:
                found.append(generate(model, cache, inputs, 40, compile_config=settings))
    assert torch.equal(*found)
    assert len(graphs) == 1


def test_other_codebooks_are_another_plan() -> None:
    """Caches of one configuration whose quantizers hold other tensors: each is read with its own."""
    model, inputs, found = model_of("llama"), rows(), []
    for length in (None, 200):
        with create_tiered_cache(model, ROTATED, length) as plain, create_tiered_cache(model, ROTATED, length) as other:
            signs = torch.tensor([1, -1] * 8, dtype=torch.int8)
            other.set_codebooks({f"{i}.{side}.signs": signs for i in range(2) for side in ("keys", "values")})
            found.append([generate(model, cache, inputs, 50) for cache in (plain, other)])
            if length:
                assert not {id(x.step_plan) for x in plain.tiered} & {id(x.step_plan) for x in other.tiered}
                state = other.cache_state_dict()
                with create_tiered_cache(model, ROTATED, length) as loaded:
                    loaded.load_cache_state_dict(state)
                    assert [x.step_plan for x in loaded.tiered] == [x.step_plan for x in other.tiered]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_caches_of_two_models_do_not_share_a_plan() -> None:
    """One configuration, other heads: what a graph knows by name has to be another thing."""
    wide, narrow = model_of("llama"), tiny("llama", fresh_seed(), head_dim=8, num_hidden_layers=2)
    with create_tiered_cache(wide, CONFIG, 200) as one, create_tiered_cache(narrow, CONFIG, 200) as other:
        for model, cache in ((wide, one), (narrow, other)):
            generate(model, cache, {"input_ids": prompt(1, 50)}, 30)
        plans = [[layer.step_plan for layer in cache.tiered] for cache in (one, other)]
        assert len({id(plan) for plan in plans[0] + plans[1]}) == 4
        with create_tiered_cache(wide, CONFIG, 200) as again:
            assert [layer.step_plan for layer in again.tiered] == plans[0]


def test_a_hybrid_model_compiles_with_transformers_own_sliding_windows() -> None:
    """Their length is a number of the host's: a few graphs, and then no more."""
    model, inputs, graphs = model_of("gemma3_text"), {"input_ids": prompt(3, 60, 2)}, list[torch.fx.GraphModule]()
    with create_tiered_cache(model, CONFIG) as growing:
        wanted = generate(model, growing, inputs, 150)
    with create_tiered_cache(model, CONFIG, max_cache_len=256) as cache:
        found = generate(model, cache, inputs, 150, compile_config=compiling("eager", graphs))
    assert torch.equal(found, wanted)
    assert 1 <= len(graphs) <= 3


def step_inputs(cache: TieredKVCache, ids: Tensor) -> dict[str, Any]:
    """What ``generate`` hands to a step: a mask over all slots, positions."""
    length = cache.get_seq_length()
    slots = cache.tiered[0].slots
    mask = (torch.arange(slots) <= length).expand(len(ids), 1, 1, -1).contiguous()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.full((len(ids), 1), length)}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@torch.no_grad()
def test_no_step_is_read_by_the_host_and_nothing_moves_or_grows(compiled: bool) -> None:
    def unread(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            with NoHostRead():
                return graph(*args)

        return run

    model, seed = model_of("llama"), fresh_seed()
    forward = torch.compile(model, backend=unread, fullgraph=True) if compiled else model
    with create_tiered_cache(model, CONFIG, max_cache_len=400) as cache:
        for _ in range(2):  # again after reset
            model(prompt(seed, 70, 2), past_key_values=cache, use_cache=True)
            places, total = addresses(cache), cache.memory_report().total
            inputs = step_inputs(cache, prompt(seed, 2, 2)[:, -1:])
            for step in range(3 * CONFIG.tile):
                inputs["attention_mask"][..., 70 + step] = True
                inputs["position_ids"].fill_(70 + step)
                with contextlib.nullcontext() if compiled else NoHostRead():
                    forward(**inputs, past_key_values=cache, use_cache=True)
                assert addresses(cache) == places
            assert cache.get_seq_length() == 70 + 3 * CONFIG.tile
            assert cache.memory_report().total == total
            cache.reset()
            assert addresses(cache) == places
            assert cache.get_seq_length() == 0


def addresses(cache: TieredKVCache) -> list[int]:
    """Where the tensors lie that a compiled step knows."""
    return [
        t.data_ptr()
        for layer in cache.tiered
        for t in (
            *(*layer._key_fields, *layer._value_fields, layer._window_keys, layer._window_values),
            *(layer._lengths, layer._used, layer._counters, layer._first, *layer._window_notes, *layer._tile_notes),
        )
    ]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_tokens_past_max_cache_len_are_refused_before_anything_changes(compiled: bool) -> None:
    model, graphs = model_of("llama"), list[torch.fx.GraphModule]()
    options = {"compile_config": compiling("eager", graphs)} if compiled else {}
    with create_tiered_cache(model, CONFIG, max_cache_len=100) as cache:
        with pytest.raises(InputError, match="100 tokens are cached and 1 more would pass max_cache_len=100"):
            generate(model, cache, {"input_ids": prompt(1, 60, 2)}, 50, **options)
        assert cache.get_seq_length() == 100
        assert len(graphs) == compiled
        with pytest.raises(InputError, match="would pass max_cache_len=100"):
            model(prompt(1, 1, 2), past_key_values=cache, use_cache=True)
        cache.crop(-20)
        model(prompt(1, 20, 2), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 100


@torch.no_grad()
def test_steps_that_were_compiled_without_generate_and_went_too_far_are_reported() -> None:
    model = model_of("llama")
    with create_tiered_cache(model, CONFIG, max_cache_len=80) as cache:
        model(prompt(1, 70, 1), past_key_values=cache, use_cache=True)
        forward = torch.compile(model, backend="eager", fullgraph=True)
        for _ in range(11):
            forward(prompt(1, 1, 1), past_key_values=cache, use_cache=True)
        with pytest.raises(InputError, match="81 tokens were fed to a cache of max_cache_len=80"):
            cache.memory_report()
        with pytest.raises(InputError, match="reset"):
            cache.get_seq_length()
        cache.reset()
        assert cache.get_seq_length() == 0


@torch.no_grad()
def test_a_compiled_step_without_a_mask_is_the_eager_one() -> None:
    """Positions come from the device's length."""
    model, found = model_of("qwen3"), []
    for compiled in (False, True):
        with create_tiered_cache(model, CONFIG, max_cache_len=200) as cache:
            model(prompt(1, 50, 2), past_key_values=cache, use_cache=True)
            forward = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
            steps = [forward(prompt(i, 1, 2), past_key_values=cache, use_cache=True).logits for i in range(60)]
            found.append(torch.cat(steps, 1))
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_a_model_that_is_compiled_for_prompts_too_breaks_its_graph_and_is_right() -> None:
    model, found = model_of("llama"), []
    for compiled in (False, True):
        forward = torch.compile(model, backend="eager") if compiled else model
        with create_tiered_cache(model, CONFIG, max_cache_len=200) as cache:
            lengths = (60, *[1] * 20, 5, 1)
            steps = [
                forward(prompt(n, length, 2), past_key_values=cache, use_cache=True).logits
                for n, length in enumerate(lengths)
            ]
            found.append(torch.cat(steps, 1))
            assert cache.get_seq_length() == sum(lengths)
    torch.testing.assert_close(*found)


def test_a_mask_with_holes_is_honoured_step_by_step() -> None:
    """Columns of the prompt that the mask hides stay hidden in compiled and eager steps."""
    model = model_of("llama")
    inputs = {"input_ids": prompt(4, 60, 2), "attention_mask": torch.ones(2, 60, dtype=torch.long)}
    inputs["attention_mask"][0, [0, 9, 30, 31]] = 0
    inputs["attention_mask"][1, 41] = 0
    with create_tiered_cache(model, CONFIG) as growing:
        wanted = generate(model, growing, inputs, 60)
    for options in ({}, {"compile_config": compiling("eager", [])}):
        with create_tiered_cache(model, CONFIG, max_cache_len=200) as cache:
            assert torch.equal(generate(model, cache, inputs, 60, **options), wanted)


def test_two_turns_beams_and_samples_compile() -> None:
    model = model_of("llama")
    for options in ({"num_beams": 3}, {"do_sample": True}):
        results = []
        for length in (None, 300):
            compiled = {"compile_config": compiling("eager", [])} if length else {}
            with create_tiered_cache(model, CONFIG, max_cache_len=length) as cache:
                torch.manual_seed(5)
                first = generate(model, cache, {"input_ids": prompt(1, 60, 1)}, 40, **options, **compiled)
                said = torch.cat([first, prompt(2, 30, 1)], 1)
                results.append(generate(model, cache, {"input_ids": said}, 40, **options, **compiled))
        assert torch.equal(*results)


def test_refusals_say_why() -> None:
    model = model_of("llama")
    for config, length, reason in (
        (CONFIG, None, "create it with max_cache_len"),
        (FadeConfig(policy={"kind": "h2o", "budget": "1MB"}), 200, "in bytes"),
        (FadeConfig(ladder=[{"tier": "int4", "capacity": 64}, {"tier": "int2"}]), 200, "2 tiers"),
        (FadeConfig(attention="stock"), 200, "its own attention"),
    ):
        with create_tiered_cache(model, config, max_cache_len=length) as cache:
            assert not cache.is_compileable
            with pytest.raises(Exception, match=reason):
                cache.enable_compile()
    with create_tiered_cache(model, CONFIG, max_cache_len=200) as cache:
        cache.enable_compile()
        assert cache.is_compileable
        assert cache.compile_refusal == ""
        with pytest.raises(Exception, match="without max_cache_len"), cache.holding():
            pass


@pytest.mark.slow
@pytest.mark.parametrize("family", ZOO)
def test_every_family_compiles_or_says_why(family: str) -> None:
    """Equal to the growing cache, compiled or not; the experts of two models are a loop over data in this transformers."""
    torch._dynamo.reset()
    model, inputs, graphs = tiny(family, fresh_seed(), **ZOO[family]), rows(), list[torch.fx.GraphModule]()
    loops = "experts" in str(ZOO[family])
    with create_tiered_cache(model, CONFIG) as growing:
        wanted = generate(model, growing, inputs, 24)
    options = {"disable_compile": True} if loops else {"compile_config": compiling("eager", graphs)}
    with create_tiered_cache(model, CONFIG, max_cache_len=100) as cache:
        assert torch.equal(generate(model, cache, inputs, 24, **options), wanted)
        assert cache.is_compileable == (family not in STOCK)
        assert ("keeps its own attention" in cache.compile_refusal) == (family in STOCK)
    assert bool(graphs) == (family not in STOCK and not loops)
    assert len(graphs) <= (1 if all(layer in cache.tiered for layer in cache.layers) else 3)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, EVICTING["h2o"]], ids=["keeps all", "evicts"])
def test_inductor_hands_the_buffers_themselves_to_the_ops(config: FadeConfig) -> None:
    """A copy of packed tiles in every step would cost what compression saves."""
    model = model_of("llama")
    forward = torch.compile(model, fullgraph=True)
    with create_tiered_cache(model, config, max_cache_len=200) as cache:
        model(prompt(1, 70, 2), past_key_values=cache, use_cache=True)
        inputs = step_inputs(cache, prompt(2, 1, 2))
        inputs["attention_mask"][..., 70] = True
        _, (code, *_) = run_and_get_code(lambda: forward(**inputs, past_key_values=cache, use_cache=True))
    names = {"append": 9, "decode_noting": 8} if config is not CONFIG else {"append": 9, "decode_attention": 8}
    notes = 4 if config is not CONFIG else 0  # positions and mass, of window and tiles
    for op, count in names.items():  # windows, fields, lengths, tiles in use, counters or padding
        calls = re.findall(rf"torch\.ops\.fade\.{op}\.default\((.*)\)", code)
        assert len(calls) == len(cache.tiered)
        for call in calls:
            buffers = call[re.search(r"\barg\d+_1", call).start() :]  # type: ignore[union-attr]
            held = re.match(r"(?:\[?arg\d+_1\]?(?:, )?|\[\], )*", buffers)
            assert held is not None
            found = re.findall(r"arg\d+_1", held[0])
            assert len(found) == len(set(found)) >= count + notes, call
