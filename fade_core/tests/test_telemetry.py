"""Events inside ``generate``: what happened to how many tokens, in bytes and seconds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from families import feed, greedy
from tiny import fresh_seed, tiny_llama

from fade_core import FadeConfig, JsonlExporter, TieredKVCache, attach_telemetry, create_tiered_cache
from fade_core.builtin.telemetry import Collector
from fade_core.errors import ConfigError, InputError
from fade_core.interfaces import Event, TelemetrySink

SMALL: dict[str, Any] = {"n_sink": 2, "recent_window": 16, "tile": 16}
TOKENWISE: dict[str, Any] = {"kind": "uniform", "bits": 4, "axis": "token"}
CONFIGS: dict[str, dict[str, Any]] = {
    "packed": SMALL,
    "h2o": SMALL | {"policy": {"kind": "h2o", "budget": 70, "every": 8}},
    "ladder": SMALL
    | {
        "policy": {"kind": "h2o", "every": 8},
        "keys": TOKENWISE,
        "ladder": [{"tier": "int4", "capacity": 32}, {"tier": "int2", "capacity": 48}],
    },
    "oldest": SMALL | {"policy": {"kind": "position", "budget": 70, "every": 8}},
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(fresh_seed())


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


def watched(model: Any, name: str, new: int = 60, prompt: int = 120) -> tuple[TieredKVCache, Collector]:
    cache, sink = create_tiered_cache(model, FadeConfig(**CONFIGS[name])), Collector()
    attach_telemetry(cache, sink)
    ids = torch.randint(1, 256, (2, prompt))
    model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)
    return cache, sink


@pytest.mark.parametrize("name", CONFIGS)
def test_events_account_for_every_token_of_every_layer(llama: Any, name: str) -> None:
    cache, sink = watched(llama, name)
    kinds = {"packed": {"encode"}, "ladder": {"encode", "demote", "evict", "reassign"}}
    assert set(sink.counts()) == kinds.get(name, {"encode", "evict", "reassign"})
    for layer in cache.tiered:
        own = [event for event in sink.events if event.layer == layer.index]
        encoded, demoted = (sum(e.tokens for e in own if e.kind == kind) for kind in ("encode", "demote"))
        unpacked, packed = (
            sum(e.tokens for e in own if e.kind == "evict" and (e.detail["from"] == "fp16") == full)
            for full in (True, False)
        )
        held = [int(store.lengths.sum()) for store in layer.held.stores]
        assert encoded - packed == sum(held)
        assert encoded + unpacked + int(layer.held.window.lengths.sum()) * 2 == 2 * 2 * cache.get_seq_length()
        if name == "ladder":
            assert packed == 0 or held[1] <= 2 * 2 * 48
            assert demoted > 0
        ranked = [event for event in own if event.kind == "reassign"]
        moved = sum(e.tokens for e in own if e.kind in ("demote", "evict") and e.detail.get("from") != "fp16")
        assert sum(event.tokens for event in ranked) == moved


@pytest.mark.parametrize("name", CONFIGS)
def test_events_carry_bytes_and_seconds(llama: Any, name: str) -> None:
    _, sink = watched(llama, name)
    for event in sink.events:
        assert 0 < event.seconds < 10
        assert event.bytes_before > 0
        assert event.bytes_after > 0
        assert 120 <= event.detail["length"] <= 180
        assert event.kind == "reassign" or event.tokens > 0
    first = [event for event in sink.events if event.detail["length"] == 120]
    assert {event.layer for event in first} == {0, 1, 2}
    dense = 2 * 2 * 2 * 120 * 16 * 4
    for event in first:
        assert event.bytes_before > dense > event.bytes_after  # the prompt itself is part of what was held


def test_ranking_happens_by_itself_as_often_as_the_policy_says(llama: Any) -> None:
    _, sink = watched(llama, "h2o", new=50)
    lengths = [event.detail["length"] for event in sink.events if event.kind == "reassign" and event.layer == 0]
    assert lengths == list(range(128, 169, 8))


def test_nothing_is_emitted_for_a_token_that_moves_nothing(llama: Any) -> None:
    cache, sink = create_tiered_cache(llama, FadeConfig(**SMALL)), Collector()
    attach_telemetry(cache, sink)
    logits = feed(llama, torch.randint(1, 256, (1, 2 + 16 + 32)), cache)
    assert sink.counts() == {"encode": 3}
    greedy(llama, logits, cache, 15)
    assert sink.counts() == {"encode": 3}
    greedy(llama, logits, cache, 1)
    assert sink.counts() == {"encode": 6}


def test_json_lines_hold_the_same_events(llama: Any, tmp_path: Path) -> None:
    cache, sink = create_tiered_cache(llama, FadeConfig(**CONFIGS["ladder"])), Collector()
    exporter = JsonlExporter(tmp_path / "events.jsonl")
    attach_telemetry(cache, sink)
    attach_telemetry(cache, exporter)
    llama.generate(torch.randint(1, 256, (1, 100)), past_key_values=cache, max_new_tokens=40, do_sample=False)
    lines = (tmp_path / "events.jsonl").read_text().splitlines()  # written as they happen, not at the end
    assert [json.loads(line) for line in lines] == [asdict(event) for event in sink.events]
    exporter.close()
    with pytest.raises(InputError, match=r"events.jsonl is closed"):
        exporter.emit(Event("encode", 0))


def test_a_configuration_file_turns_json_lines_on(llama: Any, tmp_path: Path) -> None:
    log, config = tmp_path / "events.jsonl", tmp_path / "fade.toml"
    config.write_text(
        f'n_sink = 2\nrecent_window = 16\ntile = 16\n[policy]\nkind = "h2o"\nbudget = 0.5\nevery = 8\n'
        f'[[telemetry]]\nkind = "jsonl"\npath = "{log}"\n'
    )
    ids = torch.randint(1, 256, (1, 100))
    with create_tiered_cache(llama, FadeConfig.from_file(config)) as cache:
        llama.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
        found = [json.loads(line) for line in log.read_text().splitlines()]
        assert {event["kind"] for event in found} == {"encode", "evict", "reassign"}
    # after the block the file is closed, and the cache still answers
    cache.crop(-1)
    cache.rank()
    assert cache.memory_report().total > 0
    assert len(log.read_text().splitlines()) == len(found)
    with create_tiered_cache(llama, FadeConfig.from_file(config)) as again:
        feed(llama, ids, again)
    assert len(log.read_text().splitlines()) > len(found)  # appended


def test_an_attached_sink_belongs_to_whoever_attached_it(llama: Any) -> None:
    class Closable(Collector):
        closed = False

        def close(self) -> None:
            self.closed = True

    sink = Closable()
    with create_tiered_cache(llama, FadeConfig(**SMALL)) as cache:
        attach_telemetry(cache, sink)
    assert not sink.closed
    feed(llama, torch.randint(1, 256, (1, 60)), cache)
    cache.settle()
    assert sink.events


def test_a_file_that_cannot_be_written_is_refused_and_the_model_left_alone(llama: Any, tmp_path: Path) -> None:
    before = llama.config._attn_implementation
    path = tmp_path / "missing" / "events.jsonl"
    with pytest.raises(ConfigError, match=r"telemetry cannot write to .*events.jsonl: No such file"):
        create_tiered_cache(llama, FadeConfig(telemetry=({"kind": "jsonl", "path": str(path)},)))
    assert llama.config._attn_implementation == before


def test_a_configuration_that_is_refused_opens_no_file(llama: Any, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    config = FadeConfig(telemetry=({"kind": "jsonl", "path": str(path)},), layers={"7": {"n_sink": 1}})
    with pytest.raises(ConfigError):
        create_tiered_cache(llama, config)
    assert not path.exists()


def test_a_sink_needs_nothing_but_emit(llama: Any) -> None:
    class Counting(TelemetrySink):
        seen = 0

        def emit(self, event: Event) -> None:
            self.seen += 1

    sink = Counting()
    cache = create_tiered_cache(llama, FadeConfig(**SMALL))
    attach_telemetry(cache, sink)
    feed(llama, torch.randint(1, 256, (1, 60)), cache)
    sink.close()
    assert sink.seen == 3
