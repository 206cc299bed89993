"""Saved caches go on bit by bit; what is not a saved cache of this model and configuration is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from families import assert_same_state, feed, greedy, left_padded, tiny_gemma3, tiny_qwen3
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import by_turns, fresh_seed, tiny_llama
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
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
    """The file with fields of its header changed."""
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["fade"])
    header = {name: value for name, value in (header | changes).items() if name != without}
    save_file(load_file(str(path)), str(path), metadata={"fade": json.dumps(header)})
    return path


def test_a_future_format_is_refused_with_both_versions(llama: Any, saved: Path) -> None:
    path = rewritten(saved, format=FORMAT_VERSION + 1, fade_core="9.9.9")
    with pytest.raises(
        CheckpointError, match=rf"format {FORMAT_VERSION + 1} by fade-core 9.9.9.*reads format {FORMAT_VERSION}"
    ):
        TieredKVCache.load(path, llama)


@pytest.mark.parametrize("field", ["format", "model", "weights", "config", "max_cache_len", "layers"])
def test_a_header_that_lacks_a_field_is_refused(llama: Any, saved: Path, field: str) -> None:
    with pytest.raises(CheckpointError, match=f"format None|the header of the saved cache is damaged: {field}"):
        TieredKVCache.load(rewritten(saved, field), llama)


def test_a_component_that_is_not_installed_is_named(llama: Any, saved: Path) -> None:
    with safe_open(str(saved), "pt") as file:
        config = json.loads(file.metadata()["fade"])["config"]
    config["keys"] = {"kind": "from-nowhere", "bits": 4}
    with pytest.raises(CheckpointError, match=r"does not work here.*from-nowhere"):
        TieredKVCache.load(rewritten(saved, config=config), llama)


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
]


@pytest.mark.parametrize(("number", "max_cache_len"), by_turns(LENGTH, range(len(DAMAGE))))
def test_tensors_that_cannot_be_right_are_refused(llama: Any, number: int, max_cache_len: int | None) -> None:
    name, damage = DAMAGE[number]
    state = state_of(llama, CONFIGS["h2o"])
    state["tensors"][name] = damage(state["tensors"][name])
    untouched(
        llama, state, f"layer {name[0]} of the saved cache is damaged", CONFIGS["h2o"], max_cache_len=max_cache_len
    )
    del state["tensors"][name]
    untouched(
        llama, state, f"layer {name[0]} of the saved cache is damaged", CONFIGS["h2o"], max_cache_len=max_cache_len
    )


@pytest.mark.parametrize("state", [{}, None, {"header": {}}, {"tensors": {}}, {"header": {"kind": "fade-kv-cache"}}, 3])
def test_what_is_no_state_is_refused(llama: Any, state: Any) -> None:
    untouched(llama, state, "not a saved FADE cache|saved in format None")


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
