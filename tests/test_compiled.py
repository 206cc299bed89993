"""Decode steps compile: one graph, compiled once, no host read, and addresses for good where there is ``max_cache_len``."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from test_modes import FAMILIES, LADDERS, PACKED, model_of
from test_same_answer import EVICTING, same_contents
from test_zoo import FAMILIES as ZOO
from test_zoo import STOCK
from tinymodels import fresh_seed, left_padded, prompt, tiny
from torch import Tensor
from torch._dynamo.backends.registry import lookup_backend
from torch._inductor.graph import GraphLowering
from torch._logging._internal import trace_log
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.errors import InputError

pytestmark = pytest.mark.slow  # each compiles

CONFIG = PACKED["channel_keys"]


@functools.cache
def shallow(family: str = "llama") -> PreTrainedModel:
    """One layer, for what more of them would only repeat: each is traced anew."""
    return tiny(family, fresh_seed(), **FAMILIES[family] | {"num_hidden_layers": 1})


@pytest.fixture(autouse=True)
def _fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is compiled yet; torch keeps no diary, nor does it time its guards, which take an eighth of its time."""
    monkeypatch.setattr(trace_log, "handlers", [])
    monkeypatch.setattr(torch._dynamo.guards, "profile_guard_manager", lambda *guards: 0.0)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(side_effect_replay_policy="silent", run_gc_after_compile=False):
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


@pytest.mark.parametrize(("family", "backend"), [("qwen3", "eager"), ("llama", "aot_eager")])
def test_generate_compiles_one_graph_for_50_tokens(family: str, backend: str) -> None:
    """Each row fills three tiles. Two layers and one."""
    model, inputs = shallow() if backend == "aot_eager" else model_of(family), rows()
    with create_tiered_cache(model, CONFIG) as growing:
        wanted = generate(model, growing, inputs, 50)
    graphs: list[torch.fx.GraphModule] = []
    with (
        create_tiered_cache(model, CONFIG, max_cache_len=400) as cache,
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        found = generate(model, cache, inputs, 50, compile_config=compiling(backend, graphs))
        assert torch.equal(found, wanted)
        assert len(graphs) == 1
        assert cache.get_seq_length() == growing.get_seq_length()


@pytest.mark.parametrize("name", ["ema", "h2o, one tier"])
def test_tokens_are_evicted_between_the_replays_of_one_graph(name: str) -> None:
    """Tokens, tiers and statistics are those of the growing cache; within the graph nothing is read back."""
    model, inputs, graphs = shallow("qwen3"), rows(), list[torch.fx.GraphModule]()

    def unread(graph: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(graph)

        def run(*args: Any) -> Any:
            with NoHostRead():
                return graph(*args)

        return run

    settings = CompileConfig(fullgraph=True, dynamic=None, backend=unread, mode=None)
    settings._compile_all_devices = True
    config = (LADDERS | EVICTING)[name]
    with create_tiered_cache(model, config) as growing:
        wanted = generate(model, growing, inputs, 48)
    places: list[int] = []
    with (
        create_tiered_cache(model, config, max_cache_len=400) as cache,
        torch._dynamo.config.patch(error_on_recompile=True),
    ):
        for _ in range(2):  # again after reset, in the same buffers
            found = generate(model, cache, inputs, 48, compile_config=settings)
            places = places or addresses(cache)
            assert torch.equal(found, wanted)
            assert addresses(cache) == places
            same_contents(cache, growing)
            cache.reset()
    assert len(graphs) == 1


@torch.no_grad()
def test_a_cache_that_is_not_asked_between_steps_says_so() -> None:
    """There is room for what is kept and what may come before the next ranking, not for all."""
    model, config = shallow(), EVICTING["position, one tier"].with_overrides(tile=64)
    forward = torch.compile(model, backend="eager", fullgraph=True)
    with create_tiered_cache(model, config, max_cache_len=4000) as cache:
        model(prompt(1, 300), past_key_values=cache, use_cache=True)
        inputs = step_inputs(cache, prompt(2, 1)) | {"position_ids": torch.full((1, 1), 300)}
        store, window = cache.tiered[0].held.stores[0], cache.tiered[0].held.window
        room = (
            store.pool.capacity // 2 * 64 - int(store.lengths[0, 0]) + window.capacity - window.longest
        )  # of two heads
        for _ in range(room + 1):
            forward(**inputs, past_key_values=cache, use_cache=True)
        with pytest.raises(InputError, match="get_mask_sizes"):
            cache.memory_report()


ROTATED = FadeConfig(n_sink=4, recent_window=16, tile=16, keys={"kind": "rotated"}, values={"kind": "rotated"})


@pytest.mark.parametrize("config", [CONFIG, ROTATED], ids=["uniform", "rotated"])
def test_the_next_cache_of_the_same_shape_runs_the_same_graph(config: FadeConfig) -> None:
    model, inputs, graphs = shallow(), rows(), list[torch.fx.GraphModule]()
    settings = compiling("eager", graphs)
    found = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            with create_tiered_cache(model, config, max_cache_len=200) as cache:
                found.append(generate(model, cache, inputs, 40, compile_config=settings))
    assert torch.equal(*found)
    assert len(graphs) == 1


def test_other_codebooks_are_another_graph() -> None:
    """Caches of one configuration whose quantizers hold other tensors: each is read with its own."""
    model, inputs, found = shallow(), rows(), []
    for length in (None, 200):
        with create_tiered_cache(model, ROTATED, length) as plain, create_tiered_cache(model, ROTATED, length) as other:
            signs = torch.tensor([1, -1] * 8, dtype=torch.int8)
            other.set_codebooks({f"{i}.{side}.signs": signs for i in range(1) for side in ("keys", "values")})
            options = {"compile_config": compiling("eager", [])} if length else {}
            found.append([generate(model, cache, inputs, 18, **options) for cache in (plain, other)])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_caches_of_two_models_do_not_share_a_graph() -> None:
    """One configuration, other heads: what a graph knows by name has to be another thing."""
    wide, narrow = shallow(), tiny("llama", fresh_seed(), head_dim=8, num_hidden_layers=1)
    for model in (wide, narrow, wide):
        found = []
        for length, options in ((None, {}), (200, {"compile_config": compiling("eager", [])})):
            with create_tiered_cache(model, CONFIG, length) as cache:
                found.append(generate(model, cache, {"input_ids": prompt(1, 50)}, 18, **options))
        assert torch.equal(*found)


def test_a_hybrid_model_compiles_with_transformers_own_sliding_windows() -> None:
    """Their length is a number of the host's: a few graphs, and then no more. One layer of each kind."""
    fields = FAMILIES["gemma3_text"] | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model, inputs, graphs = tiny("gemma3_text", fresh_seed(), **fields), {"input_ids": prompt(3, 60, 2)}, []
    with create_tiered_cache(model, CONFIG) as growing:
        wanted = generate(model, growing, inputs, 40)
    with create_tiered_cache(model, CONFIG, max_cache_len=256) as cache:
        found = generate(model, cache, inputs, 40, compile_config=compiling("eager", graphs))
    assert torch.equal(found, wanted)
    assert 1 <= len(graphs) <= 3


def step_inputs(cache: TieredKVCache, ids: Tensor) -> dict[str, Any]:
    """What ``generate`` hands to a step: a mask over all slots, positions."""
    length = cache.get_seq_length()
    slots = cache.tiered[0].steps.slots
    mask = (torch.arange(slots) <= length).expand(len(ids), 1, 1, -1).contiguous()
    return {"input_ids": ids, "attention_mask": mask, "position_ids": torch.full((len(ids), 1), length)}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@torch.no_grad()
def test_no_compiled_step_is_read_by_the_host_and_nothing_moves_or_grows(compiled: bool) -> None:
    """On a CPU uncompiled steps look at lengths, which lie there; fade_core/tests/test_append_op.py says that they need not."""

    def unread(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        def run(*args: Any) -> Any:
            with NoHostRead():
                return graph(*args)

        return run

    model, seed = shallow(), fresh_seed()
    forward = torch.compile(model, backend=unread, fullgraph=True) if compiled else model
    with create_tiered_cache(model, CONFIG, max_cache_len=400) as cache:
        first = None
        for _ in range(2):  # again after reset
            model(prompt(seed, 70, 2), past_key_values=cache, use_cache=True)
            places, total = addresses(cache), cache.memory_report().total
            first = first or places
            assert places == first
            inputs = step_inputs(cache, prompt(seed, 2, 2)[:, -1:])
            for step in range(3 * CONFIG.tile):
                inputs["attention_mask"][..., 70 + step] = True
                inputs["position_ids"].fill_(70 + step)
                forward(**inputs, past_key_values=cache, use_cache=True)
                assert addresses(cache) == places
            assert cache.get_seq_length() == 70 + 3 * CONFIG.tile
            assert cache.memory_report().total == total
            cache.reset()
            assert cache.get_seq_length() == 0


def addresses(cache: TieredKVCache) -> list[int]:
    """Where the cache's tokens lie."""
    found = []
    for layer in cache.tiered:
        found += [layer.held.window.keys.data_ptr(), layer.held.window.values.data_ptr()]
        found += [field.data_ptr() for store in layer.held.stores for field in store.pool.fields.values()]
    return found


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_tokens_past_max_cache_len_are_refused_before_anything_changes(compiled: bool) -> None:
    model, graphs = shallow(), list[torch.fx.GraphModule]()
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
    model = shallow()
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
    model, found = shallow(), []
    for compiled in (False, True):
        with create_tiered_cache(model, CONFIG, max_cache_len=200) as cache:
            model(prompt(1, 50, 2), past_key_values=cache, use_cache=True)
            forward = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
            steps = [forward(prompt(i, 1, 2), past_key_values=cache, use_cache=True).logits for i in range(36)]
            found.append(torch.cat(steps, 1))
    torch.testing.assert_close(*found)


@torch.no_grad()
def test_a_model_that_is_compiled_for_prompts_too_breaks_its_graph_and_is_right() -> None:
    model, found = shallow(), []
    for compiled in (False, True):
        forward = torch.compile(model, backend="eager") if compiled else model
        with create_tiered_cache(model, CONFIG, max_cache_len=200) as cache:
            lengths = (60, *[1] * 4, 5, 1)
            steps = [
                forward(prompt(n, length, 2), past_key_values=cache, use_cache=True).logits
                for n, length in enumerate(lengths)
            ]
            found.append(torch.cat(steps, 1))
            assert cache.get_seq_length() == sum(lengths)
    torch.testing.assert_close(*found)


def test_a_mask_with_holes_is_honoured_step_by_step() -> None:
    """Columns of the prompt that the mask hides stay hidden in compiled and eager steps."""
    model = shallow()
    inputs = {"input_ids": prompt(4, 60, 2), "attention_mask": torch.ones(2, 60, dtype=torch.long)}
    inputs["attention_mask"][0, [0, 9, 30, 31]] = 0
    inputs["attention_mask"][1, 41] = 0
    with create_tiered_cache(model, CONFIG) as growing:
        wanted = generate(model, growing, inputs, 36)
    for options in ({}, {"compile_config": compiling("eager", [])}):
        with create_tiered_cache(model, CONFIG, max_cache_len=200) as cache:
            assert torch.equal(generate(model, cache, inputs, 36, **options), wanted)


def test_two_turns_beams_and_samples_compile() -> None:
    model = shallow()
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
    with create_tiered_cache(model, FadeConfig(attention="stock"), max_cache_len=200) as cache:
        assert not cache.is_compileable
        with pytest.raises(Exception, match="its own attention"):
            cache.enable_compile()
    with create_tiered_cache(model, CONFIG, max_cache_len=200) as cache:
        cache.enable_compile()
        assert cache.is_compileable
        assert cache.compile_refusal == ""


def smallest(family: str) -> PreTrainedModel:
    """The smallest model that has every kind of layer of its family: one, or two of unlike kinds."""
    fields = dict(ZOO[family])
    kinds = 2 if "layer_types" in fields or fields.get("sliding_window") else 1
    fields.pop("n_layer", None)  # another name of the same
    fields["num_hidden_layers"] = kinds
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][:2]
    return tiny(family, fresh_seed(), **fields)


@pytest.mark.parametrize("family", [family for family in ZOO if family != "gemma3_text"])
def test_every_family_compiles_or_says_why(family: str) -> None:
    """Equal to the growing cache, compiled or not; the experts of two models are a loop over data in this transformers.

    Gemma 3 is the hybrid model above.
    """
    torch._dynamo.reset()
    model, graphs = smallest(family), list[torch.fx.GraphModule]()
    inputs = left_padded([prompt(i, length)[0] for i, length in enumerate((33, 50, 27))])  # each fills a tile
    loops = "experts" in str(ZOO[family])
    with create_tiered_cache(model, CONFIG) as growing:
        wanted = generate(model, growing, inputs, 12)
    options = {"disable_compile": True} if loops else {"compile_config": compiling("eager", graphs)}
    with create_tiered_cache(model, CONFIG, max_cache_len=100) as cache:
        assert torch.equal(generate(model, cache, inputs, 12, **options), wanted)
        assert cache.is_compileable == (family not in STOCK)
        assert ("keeps its own attention" in cache.compile_refusal) == (family in STOCK)
    assert bool(graphs) == (family not in STOCK and not loops)
    assert len(graphs) <= (1 if all(layer in cache.tiered for layer in cache.layers) else 3)


def code_of(step: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> str:
    """What inductor writes for the graph of ``step``: the C++ compiler, which takes longest, would only translate it."""
    written: list[str] = []

    def stop(code: str) -> None:
        written.append(code)
        raise RuntimeError("written")

    monkeypatch.setattr(GraphLowering, "save_output_code", stop)
    with pytest.raises(Exception, match="written"):
        step()
    (code,) = written
    return code


@torch.no_grad()
@pytest.mark.parametrize("config", [CONFIG, EVICTING["h2o, one tier"]], ids=["keeps all", "evicts"])
def test_inductor_hands_the_buffers_themselves_to_the_ops(config: FadeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of packed tiles in every step would cost what compression saves."""
    model = shallow()
    forward = torch.compile(model, fullgraph=True)
    # Fast code is not asked for, and finding out what the machine can do takes long; and it is written, not found again.
    plain = {"cpp.vec_isa_ok": False, "force_disable_caches": True}
    with create_tiered_cache(model, config, max_cache_len=200) as cache, torch._inductor.config.patch(plain):
        model(prompt(1, 70, 2), past_key_values=cache, use_cache=True)
        inputs = step_inputs(cache, prompt(2, 1, 2))
        inputs["attention_mask"][..., 70] = True
        code = code_of(lambda: forward(**inputs, past_key_values=cache, use_cache=True), monkeypatch)
        calls = re.findall(r"torch\.ops\.fade\.(\w+)\.default\((.*)\)", code)
        assert len(calls) == 2 * len(cache.tiered)
    for op, call in calls:
        inputs_of_graph = re.findall(r"arg\d+_1", call)  # windows, fields, lengths, tiles in use
        assert len(set(inputs_of_graph)) >= 8, (op, call)
        for held in re.findall(r"\[([^\]]*)\]", call):
            assert all(re.fullmatch(r"(arg\d+_1)?", name.strip()) for name in held.split(",")), (op, call)
