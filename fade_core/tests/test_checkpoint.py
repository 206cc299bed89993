"""Saved caches go on bit by bit; what is not a saved cache of this model and configuration is refused."""

from __future__ import annotations

import contextlib
import json
import math
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import assert_same_state, feed, greedy, left_padded, tiny_gemma3, tiny_qwen3
from safetensors.torch import save_file
from sealing import seal, unsealed
from tiny import by_turns, fresh_seed, tiny_llama
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from fade_core import FadeConfig, TieredKVCache, attach_telemetry, create_tiered_cache
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.builtin.telemetry import Collector
from fade_core.errors import CheckpointError
from fade_core.packed import FORMAT_VERSION

SMALL: dict[str, Any] = {"n_sink": 2, "recent_window": 16, "tile": 16}
TOKENWISE: dict[str, Any] = {"kind": "uniform", "bits": 4, "axis": "token"}
LENGTH = 300
BOTH = pytest.mark.parametrize("max_cache_len", [None, LENGTH])
CONFIGS: dict[str, dict[str, Any]] = {
    "packed": SMALL,
    "grouped": SMALL | {"keys": {"kind": "uniform", "bits": 8, "axis": "channel", "group": 8}, "values": TOKENWISE},
    "three bits": SMALL
    | {"keys": {"kind": "uniform", "bits": 3, "axis": "channel"}, "policy": {"kind": "h2o", "budget": 70, "every": 6}},
    "h2o": SMALL | {"policy": {"kind": "h2o", "budget": 0.5, "every": 3}},
    "ema": SMALL | {"policy": {"kind": "ema", "budget": 0.6, "every": 5}, "keys": TOKENWISE},
    "ladder": SMALL
    | {
        "policy": {"kind": "h2o", "every": 4},
        "keys": TOKENWISE,
        "ladder": [
            {"tier": "fp16", "capacity": 16},
            {"tier": "int4", "capacity": 32},
            {"tier": "int2", "capacity": 48},
        ],
    },
    "oldest": SMALL | {"policy": {"kind": "position", "budget": 70, "every": 7}},
    "layers": SMALL | {"layers": {"0": {"keys": {"kind": "uniform", "bits": 8}}, "-1": {"n_sink": 5}}},
    "stock": SMALL | {"attention": "stock"},
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(fresh_seed())


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama(layers=2)


@pytest.fixture(scope="module")
def gemma() -> Any:
    return tiny_gemma3(layers=3)


@pytest.fixture
def saved(llama: Any, tmp_path: Path) -> Path:
    cache = create_tiered_cache(llama, FadeConfig(**SMALL))
    feed(llama, torch.randint(1, 256, (1, 90)), cache)
    cache.save(tmp_path / "cache.safetensors")
    cache.detach()
    return tmp_path / "cache.safetensors"


@pytest.mark.parametrize(("family", "name", "max_cache_len"), by_turns(LENGTH, ["llama", "gemma"], CONFIGS))
def test_a_loaded_cache_goes_on_with_the_same_tokens_and_the_same_bits(
    family: str, name: str, max_cache_len: int | None, request: Any, tmp_path: Path
) -> None:
    model = request.getfixturevalue(family)
    ids, mask = left_padded((136, 98, 37))
    cache = create_tiered_cache(model, FadeConfig(**CONFIGS[name]), max_cache_len)
    logits = greedy(model, feed(model, ids, cache, mask), cache, 4, mask)[1]
    mask = torch.cat([mask, mask.new_ones(3, 4)], dim=1)
    cache.save(tmp_path / "cache.safetensors")
    state = cache.cache_state_dict()
    loaded = TieredKVCache.load(tmp_path / "cache.safetensors", model)
    other = create_tiered_cache(model, FadeConfig(**CONFIGS[name]), max_cache_len)
    feed(model, ids[:, :40], other)  # whatever it held is replaced
    other.load_cache_state_dict(state)
    for copy in (loaded, other):
        assert copy.config == cache.config
        assert copy.get_seq_length() == 140
        assert_same_state(copy.cache_state_dict(), state)
        if max_cache_len is None:  # no slack is saved
            assert copy.memory_report().total <= cache.memory_report().total
    expected, last = greedy(model, logits, cache, 9, mask)  # two rows fill a tile
    for copy in (loaded, other):
        found, end = greedy(model, logits, copy, 9, mask)
        assert torch.equal(found, expected)
        assert torch.equal(end, last)
        assert_same_state(copy.cache_state_dict(), cache.cache_state_dict())


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [(name, *lengths) for name in CONFIGS for lengths in ((None, LENGTH), (LENGTH, None)) if name != "stock"],
)
def test_a_cache_with_max_cache_len_goes_on_where_one_without_was_saved_and_the_other_way_round(
    llama: Any, name: str, first: int | None, second: int | None
) -> None:
    ids, mask = left_padded((127, 98))
    config = FadeConfig(**CONFIGS[name])
    cache, other = create_tiered_cache(llama, config, first), create_tiered_cache(llama, config, second)
    logits = greedy(llama, feed(llama, ids, cache, mask), cache, 4, mask)[1]
    mask = torch.cat([mask, mask.new_ones(2, 4)], dim=1)
    cache.crop(-9)  # through what has been packed
    mask = mask[:, :-9]
    other.load_cache_state_dict(cache.cache_state_dict())
    assert other.get_seq_length() == 122
    expected, last = greedy(llama, logits, cache, 9, mask)  # the eighth fills a tile
    found, end = greedy(llama, logits, other, 9, mask)
    assert torch.equal(found, expected)
    assert torch.equal(end, last)


@BOTH
def test_beams_that_share_tiles_are_saved_apart_from_no_one(
    llama: Any, tmp_path: Path, max_cache_len: int | None
) -> None:
    cache = create_tiered_cache(llama, FadeConfig(**CONFIGS["h2o"]), max_cache_len)
    logits = feed(llama, torch.randint(1, 256, (1, 100)), cache)
    cache.batch_repeat_interleave(4)
    cache.save(tmp_path / "cache.safetensors")
    loaded = TieredKVCache.load(tmp_path / "cache.safetensors", llama)
    assert loaded.memory_report().total <= cache.memory_report().total
    logits = logits.repeat(4, 1) + torch.randn(4, 256)
    assert torch.equal(greedy(llama, logits, loaded, 20)[0], greedy(llama, logits, cache, 20)[0])


@BOTH
def test_the_state_is_a_copy(llama: Any, max_cache_len: int | None) -> None:
    cache = create_tiered_cache(llama, FadeConfig(**CONFIGS["h2o"]), max_cache_len)
    logits = feed(llama, torch.randint(1, 256, (1, 100)), cache)
    state = cache.cache_state_dict()
    before = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    expected, _ = greedy(llama, logits, cache, 20)
    assert all(torch.equal(state["tensors"][name], tensor) for name, tensor in before.items())
    cache.load_cache_state_dict(state)
    assert torch.equal(greedy(llama, logits, cache, 20)[0], expected)
    cache.load_cache_state_dict(state)  # and again: loading took copies as well
    assert torch.equal(greedy(llama, logits, cache, 20)[0], expected)


def test_an_empty_cache_is_saved_too(llama: Any, tmp_path: Path) -> None:
    create_tiered_cache(llama, max_cache_len=200).save(tmp_path / "cache.safetensors")
    loaded = TieredKVCache.load(tmp_path / "cache.safetensors", llama)
    assert loaded.get_seq_length() == 0
    assert loaded.get_max_length() == 200


@BOTH
def test_generate_goes_on_from_a_loaded_cache(llama: Any, tmp_path: Path, max_cache_len: int | None) -> None:
    ids = torch.randint(1, 256, (1, 100))
    cache = create_tiered_cache(llama, FadeConfig(**CONFIGS["ladder"]), max_cache_len)
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 20}
    first = llama.generate(ids, past_key_values=cache, **options)
    cache.save(tmp_path / "cache.safetensors")
    prompt = torch.cat([first, torch.randint(1, 256, (1, 40))], dim=1)
    expected = llama.generate(prompt, past_key_values=cache, **options)
    cache.detach()
    loaded = TieredKVCache.load(tmp_path / "cache.safetensors", llama)
    assert torch.equal(llama.generate(prompt, past_key_values=loaded, **options), expected)


def test_linear_attention_is_saved_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny_qwen3_next()
    ids = torch.randint(1, 256, (2, 60))
    cache = create_tiered_cache(model, FadeConfig(**SMALL))
    logits = feed(model, ids, cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = TieredKVCache.load(tmp_path / "cache.safetensors", model)
    assert torch.equal(greedy(model, logits, loaded, 10)[0], greedy(model, logits, cache, 10)[0])
    assert_same_state(loaded.cache_state_dict(), cache.cache_state_dict())


def tiny_qwen3_next() -> Any:
    sizes = {f"linear_{what}": 2 for what in ("num_key_heads", "num_value_heads")}
    sizes |= {f"linear_{what}": 16 for what in ("key_head_dim", "value_head_dim")}
    config = Qwen3NextConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        mlp_only_layers=[0, 1],
        layer_types=["linear_attention", "full_attention"],
        initializer_range=0.2,
        **sizes,
    )
    return Qwen3NextForCausalLM(config).eval()


# --- what is refused ---


def untouched(model: Any, state: Any, message: str, config: dict[str, Any] = SMALL, **options: Any) -> None:
    """Loading ``state`` is refused, and the cache goes on as if nobody had tried."""
    ids = torch.randint(1, 256, (1, 70))
    plain, tried = (create_tiered_cache(model, FadeConfig(**config), **options) for _ in range(2))
    logits = [feed(model, ids, cache) for cache in (plain, tried)]
    before = tried.cache_state_dict()
    with pytest.raises(CheckpointError, match=message):
        tried.load_cache_state_dict(state)
    assert_same_state(tried.cache_state_dict(), before)
    assert torch.equal(greedy(model, logits[1], tried, 5)[0], greedy(model, logits[0], plain, 5)[0])


def state_of(model: Any, config: dict[str, Any] = SMALL, tokens: int = 90) -> dict[str, Any]:
    cache = create_tiered_cache(model, FadeConfig(**config))
    feed(model, torch.randint(1, 256, (2, tokens)), cache)
    return cache.cache_state_dict()


def test_another_model_is_refused(llama: Any, saved: Path) -> None:
    with pytest.raises(CheckpointError, match="a model of another shape"):
        TieredKVCache.load(saved, tiny_llama(layers=4))
    with pytest.raises(CheckpointError, match="a model of another shape"):
        TieredKVCache.load(saved, tiny_qwen3(layers=2))
    with pytest.raises(CheckpointError, match="with other weights"):
        TieredKVCache.load(saved, tiny_llama(seed=1, layers=2))
    assert TieredKVCache.load(saved, tiny_llama(layers=2)).get_seq_length() == 90  # the same weights, loaded once more
    untouched(llama, state_of(tiny_llama(layers=4)), "a model of another shape")
    untouched(llama, state_of(tiny_llama(seed=1, layers=2)), "with other weights")


def test_a_refused_file_leaves_the_models_attention_alone(llama: Any, saved: Path) -> None:
    other = tiny_llama(layers=4)
    before = other.config._attn_implementation
    with pytest.raises(CheckpointError):
        TieredKVCache.load(saved, other)
    assert other.config._attn_implementation == before


def test_another_configuration_is_refused(llama: Any) -> None:
    untouched(llama, state_of(llama, CONFIGS["h2o"]), "another configuration")
    untouched(llama, state_of(llama, SMALL | {"recent_window": 17}), "another configuration")


def test_kernels_and_telemetry_are_free_to_change(llama: Any, tmp_path: Path) -> None:
    state = state_of(llama)
    options: dict[str, Any] = {"kernel": {"kind": "torch"}}
    options["telemetry"] = [{"kind": "jsonl", "path": str(tmp_path / "events.jsonl")}]
    cache = create_tiered_cache(llama, FadeConfig(**SMALL, **options))
    cache.load_cache_state_dict(state)
    assert cache.get_seq_length() == 90


def test_more_tokens_than_max_cache_len_are_refused(llama: Any) -> None:
    untouched(llama, state_of(llama), "90 tokens were saved; this cache has max_cache_len=80", max_cache_len=80)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.3, 0.9, -1])
def test_a_truncated_file_is_refused(llama: Any, saved: Path, keep: float) -> None:
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(
        CheckpointError, match=r"cache.safetensors is not a safetensors file that FADE wrote, or is damaged"
    ):
        TieredKVCache.load(saved, llama)


def test_files_of_other_kinds_are_refused(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(CheckpointError, match="there is no file"):
        TieredKVCache.load(path, llama)
    with pytest.raises(CheckpointError, match="there is no file"):
        TieredKVCache.load(tmp_path, llama)
    path.write_bytes(bytes(torch.randint(0, 256, (4000,)).tolist()))
    with pytest.raises(CheckpointError, match="is damaged"):
        TieredKVCache.load(path, llama)
    save_file({"weight": torch.zeros(3)}, str(path))
    with pytest.raises(CheckpointError, match="not a saved FADE cache"):
        TieredKVCache.load(path, llama)
    save_file({"weight": torch.zeros(3)}, str(path), metadata={"fade": "{not json"})
    with pytest.raises(CheckpointError, match="is damaged"):
        TieredKVCache.load(path, llama)
    save_file({"weight": torch.zeros(3)}, str(path), metadata={"fade": '{"kind": "something else"}'})
    with pytest.raises(CheckpointError, match="not a saved FADE cache"):
        TieredKVCache.load(path, llama)


class Exploding:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("the file was unpickled",))


def test_nothing_is_ever_unpickled(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    path.write_bytes(pickle.dumps(Exploding()))
    with pytest.raises(CheckpointError):
        TieredKVCache.load(path, llama)
    torch.save({"header": Exploding()}, path)
    with pytest.raises(CheckpointError):
        TieredKVCache.load(path, llama)


def rewritten(path: Path, without: str = "", **changes: Any) -> Path:
    """The file with fields of its header changed, its checksum right all the same."""
    header, tensors = unsealed(path)
    return seal(path, {name: value for name, value in (header | changes).items() if name != without}, tensors)


@pytest.mark.parametrize("what", ["header", "tensors"])
def test_a_flipped_bit_is_refused(llama: Any, saved: Path, what: str) -> None:
    content = bytearray(saved.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    for _ in range(10):
        at, bit = (int(torch.randint(most, ())) for most in (start if what == "header" else len(content) - start, 8))
        damaged = bytearray(content)
        damaged[at + (0 if what == "header" else start)] ^= 1 << bit
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged|has no checksum"):
            TieredKVCache.load(saved, llama)


def test_a_file_without_a_checksum_is_refused_by_name(llama: Any, saved: Path) -> None:
    header, tensors = unsealed(saved)
    save_file(tensors, str(saved), metadata={"fade": json.dumps(header)})  # as files were before they had one
    with pytest.raises(
        CheckpointError, match=r"has no checksum: an older version of FADE wrote it.*save the cache again"
    ):
        TieredKVCache.load(saved, llama)


def test_a_future_format_is_refused_with_both_versions(llama: Any, saved: Path) -> None:
    path = rewritten(saved, format=FORMAT_VERSION + 1)
    with pytest.raises(CheckpointError, match=rf"format {FORMAT_VERSION + 1}, .*reads format {FORMAT_VERSION}"):
        TieredKVCache.load(path, llama)


@pytest.mark.parametrize("field", ["format", "fade_core", "model", "weights", "config", "max_cache_len", "layers"])
def test_a_header_that_lacks_a_field_is_refused(llama: Any, saved: Path, field: str) -> None:
    with pytest.raises(
        CheckpointError, match=f"format None|the header of .* is damaged: {field}: this field is needed"
    ):
        TieredKVCache.load(rewritten(saved, field), llama)


ODD = [None, -1, 0, True, 1.5, 10**30, math.nan, "x", "", [], {}, [[]], {"a": {"a": 1}}, ["a"] * 3]


@pytest.mark.parametrize("part", ["header", "layer", "config"])
def test_odd_values_are_refused_or_change_nothing(llama: Any, saved: Path, part: str) -> None:
    header, tensors = unsealed(saved)
    held = TieredKVCache.load(saved, llama)
    good, ids = held.cache_state_dict(), torch.randint(1, 256, (1, 4))
    expected = feed(llama, ids, held)
    target = create_tiered_cache(llama, FadeConfig(**SMALL))
    feed(llama, torch.randint(1, 256, (1, 50)), target)
    before = target.cache_state_dict()
    table = {"header": header, "layer": header["layers"]["1"], "config": header["config"]}[part]
    for name in [*table, "surprise"]:
        for odd in torch.randperm(len(ODD))[:3].tolist():
            fields = table | {name: ODD[odd]}
            if part == "layer":
                fields = {"layers": header["layers"] | {"1": fields}}
            changed = header | ({"config": fields} if part == "config" else fields)
            with contextlib.suppress(CheckpointError):
                loaded = TieredKVCache.load(seal(saved, changed, tensors), llama)
                # what does not decide what is held: sinks, a budget that was kept, the version that wrote it
                assert loaded.get_seq_length() == 90
                assert torch.isfinite(feed(llama, ids, loaded)).all()
                loaded.detach()
            with contextlib.suppress(CheckpointError):
                target.load_cache_state_dict({"header": good["header"] | changed, "tensors": good["tensors"]})
                assert torch.equal(feed(llama, ids, target), expected)
                target.load_cache_state_dict(before)
            assert_same_state(target.cache_state_dict(), before)


def test_a_component_that_is_not_installed_is_named(llama: Any, saved: Path) -> None:
    config = unsealed(saved)[0]["config"] | {"keys": {"kind": "from-nowhere", "bits": 4}}
    with pytest.raises(CheckpointError, match=r"does not work here.*from-nowhere"):
        TieredKVCache.load(rewritten(saved, config=config), llama)


def test_loading_writes_no_file(llama: Any, saved: Path, tmp_path: Path) -> None:
    sink = [{"kind": "jsonl", "path": str(tmp_path / "planted.jsonl")}]
    loaded = TieredKVCache.load(rewritten(saved, config=unsealed(saved)[0]["config"] | {"telemetry": sink}), llama)
    feed(llama, torch.randint(1, 256, (1, 40)), loaded)
    assert not (tmp_path / "planted.jsonl").exists()
    loaded.detach()
    with create_tiered_cache(llama, FadeConfig(**SMALL, telemetry=sink)) as told:
        feed(llama, torch.randint(1, 256, (1, 40)), told)
        told.save(saved)
    assert "telemetry" not in unsealed(saved)[0]["config"]
    collected = Collector()
    loaded = TieredKVCache.load(saved, llama)
    attach_telemetry(loaded, collected)
    feed(llama, torch.randint(1, 256, (1, 40)), loaded)
    assert collected.counts()["encode"]


def test_room_is_made_for_what_is_plausible_alone(llama: Any, saved: Path, monkeypatch: Any) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(torch, "zeros", lambda *_, **__: pytest.fail("room was made"))
        patched.setattr(TieredKVCache, "__init__", lambda *_: pytest.fail("a cache was made"))
        with pytest.raises(CheckpointError, match=r"room for 1,000,000,000 tokens.*\(65,536\).*max_cache_len=\.\.\."):
            TieredKVCache.load(rewritten(saved, max_cache_len=10**9), llama)
    with pytest.raises(CheckpointError, match="90 tokens were saved; this cache has max_cache_len=80"):
        TieredKVCache.load(saved, llama, max_cache_len=80)
    loaded = TieredKVCache.load(saved, llama, max_cache_len=300)
    assert loaded.get_max_length() == 300
    loaded.detach()
    header, tensors = unsealed(saved)
    for name, shape in (("0.window.keys", (10**9, 2, 0, 16)), ("0.window.keys", (1, 10**9, 0, 16))):
        claimed = {
            n: torch.empty(shape) if n.startswith("0.window") and t.dim() == 4 else t for n, t in tensors.items()
        }
        assert claimed[name].shape == shape
        with pytest.raises(CheckpointError, match="layer 0 of the saved cache is damaged: the number of"):
            TieredKVCache.load(seal(saved, header | {"max_cache_len": 4096}, claimed), llama)


def test_layers_that_disagree_are_refused(llama: Any, gemma: Any) -> None:
    state = state_of(llama)
    header = deepcopy(state["header"])
    header["layers"]["1"]["logical"] += 1
    untouched(llama, state | {"header": header}, "its layers hold different numbers of tokens")
    for layer in header["layers"].values():
        layer["logical"] = 95
    untouched(llama, state | {"header": header}, "layer 0 of the saved cache is damaged: the number of tokens")
    header = deepcopy(state["header"])
    header["layers"]["0"] = {"initialized": False}
    untouched(llama, state | {"header": header}, "its layers hold different numbers of tokens")
    state = state_of(gemma)
    sliding = next(i for i, layer in state["header"]["layers"].items() if "attributes" in layer)
    for name, value in (("cumulative_length", 91), ("sliding_window", 10**9), ("update", 3), ("record_past", 1)):
        header = deepcopy(state["header"])
        header["layers"][sliding]["attributes"][name] = {"value": value}
        untouched(gemma, state | {"header": header}, f"layer {sliding} of the saved cache is damaged")
    del header["layers"][sliding]["attributes"]["keys"]
    untouched(gemma, state | {"header": header}, f"layer {sliding} of the saved cache is damaged")


def test_quantizers_are_as_before_after_a_refusal(llama: Any, monkeypatch: Any) -> None:
    state = state_of(llama)
    learnt: list[Any] = []

    def load_state_dict(self: Any, held: Any) -> None:
        learnt.append((self, dict(held)))
        if held and len(learnt) == 5:
            raise RuntimeError("no such shape")

    monkeypatch.setattr(UniformQuantizer, "load_state_dict", load_state_dict)
    state["tensors"] |= {f"{i}.quantizer0.{side}.book": torch.zeros(2) for i in range(2) for side in "kv"}
    state["tensors"]["1.quantizer0.v.book"] = torch.ones(3)
    cache = create_tiered_cache(llama, FadeConfig(**SMALL))
    feed(llama, torch.randint(1, 256, (1, 70)), cache)
    before = cache.cache_state_dict()
    learnt.append((None, {}))
    with pytest.raises(
        CheckpointError, match="what quantizers have learnt is damaged in the saved cache: no such shape"
    ):
        cache.load_cache_state_dict(state)
    asked, restored = [q for q, _ in learnt[1:5]], learnt[5:]
    assert [q for q, _ in restored] == asked
    assert all(not held for _, held in restored)
    assert_same_state(cache.cache_state_dict(), before)


DAMAGE: list[tuple[str, Any]] = [
    ("0.window.keys", lambda t: t[:, :, :, :5]),
    ("0.window.keys", lambda t: t.double()),
    ("0.window.values", lambda t: t[:1]),
    ("0.window.positions", lambda t: t + 1000),
    ("0.window.lengths", lambda t: t + 7),
    ("1.padding", lambda t: t - 4),
    ("1.padding", lambda t: t[:1]),
    ("1.store0.table", lambda t: t + 1),
    ("1.store0.table", lambda t: t[..., :0]),
    ("1.store0.counts", lambda t: t * 2),
    ("1.store0.counts", lambda t: t * 0),
    ("1.store0.pool.k.codes4", lambda t: t[:1]),
    ("1.store0.pool.v.meta", lambda t: t.long()),
    ("1.store0.offsets", lambda t: t + 500),
    ("1.store0.statistic.mass", lambda t: t[..., :3]),
    ("1.store0.statistic.mass", lambda t: t * math.nan),
    ("0.window.keys", lambda t: t * math.inf),
    ("0.window.positions", lambda t: t.flip(-1)),
    ("0.window.positions", lambda t: t.long()),
    ("0.window.lengths", lambda t: t.bool()),
    ("1.padding", lambda t: t.to(torch.int8)),
    ("1.store0.table", lambda t: t * 0),
    ("1.store0.table", lambda t: torch.cat([t, t - t - 1], -1)),
    ("0.surprise", lambda t: torch.zeros(3)),
]


@pytest.mark.parametrize(("number", "max_cache_len"), by_turns(LENGTH, range(len(DAMAGE))))
def test_tensors_that_cannot_be_right_are_refused(llama: Any, number: int, max_cache_len: int | None) -> None:
    name, damage = DAMAGE[number]
    state = state_of(llama, CONFIGS["h2o"])
    state["tensors"][name] = damage(state["tensors"].get(name))
    untouched(
        llama, state, f"layer {name[0]} of the saved cache is damaged", CONFIGS["h2o"], max_cache_len=max_cache_len
    )
    del state["tensors"][name]
    if name == "0.surprise":
        return
    untouched(
        llama, state, f"layer {name[0]} of the saved cache is damaged", CONFIGS["h2o"], max_cache_len=max_cache_len
    )


@pytest.mark.parametrize("state", [{}, None, {"header": {}}, {"tensors": {}}, {"header": {"kind": "fade-kv-cache"}}, 3])
def test_what_is_no_state_is_refused(llama: Any, state: Any) -> None:
    untouched(llama, state, "not a saved FADE cache|has format None")


@BOTH
def test_a_debug_dump_says_where_everything_lives(llama: Any, tmp_path: Path, max_cache_len: int | None) -> None:
    ids, mask = left_padded((120, 91))
    cache = create_tiered_cache(llama, FadeConfig(**CONFIGS["ladder"]), max_cache_len)
    feed(llama, ids, cache, mask)
    cache.dump_debug(tmp_path / "snapshot.json")
    found = json.loads((tmp_path / "snapshot.json").read_text())
    assert found["tier_names"] == ["fp16", "fp16", "int4", "int2"]
    assert found["memory"]["total"] == cache.memory_report().total
    assert found["config"] == cache.config.to_dict()
    for shown, layer in zip(found["layers"], cache.tiered, strict=True):
        assert shown["logical_length"] == 120
        assert shown["padding"] == [0, 29]
        levels = layer.held.tier_map()
        assert shown["window"] == (levels == 0).sum(-1)[:, 0].tolist()
        for level, store in enumerate(layer.held.stores, start=1):
            assert shown["tiers"][store.tier.name] == (levels == level).sum(-1).tolist()
    with pytest.raises(CheckpointError):
        TieredKVCache.load(tmp_path / "snapshot.json", llama)
    for write in (cache.dump_debug, cache.save):
        with pytest.raises(CheckpointError, match=r"cannot be written: No such file or directory"):
            write(tmp_path / "no" / "where")
