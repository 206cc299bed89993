"""Codes learnt from the prompt: what is learnt, when, and what happens where nothing can be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fade_core import FadeConfig, TieredKVCache, attach_telemetry, create_tiered_cache, get_quantizer
from fade_core.errors import CheckpointError, ConfigError
from fade_core.interfaces import Event, PlaneLayout, PromptView, TelemetrySink
from fade_core.testing import check_quantizer
from fade_quant_rotated.calibrate import watching
from fade_quant_rotated.learning import Learning
from fade_quant_rotated.prompt import moments_of
from fade_quant_rotated.self_calibrated import SelfCalibratedQuantizer
from fade_quant_rotated.statistics import Collector, LayerMoments

transformers = pytest.importorskip("transformers")

HEADS, DIM, VOCAB, LAYERS = 2, 16, 97, 2
SINKS, WINDOW = 4, 32
SIDE = {"kind": "self-calibrated", "bits": 6.0}
FIELDS: dict[str, Any] = {"n_sink": SINKS, "recent_window": WINDOW, "keys": SIDE, "values": SIDE}


def tiny(kind: str = "Llama", **changes: Any) -> Any:
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "head_dim": DIM,
        "max_position_embeddings": 1024,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        **changes,
    }
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes)).eval()


@pytest.fixture
def model(seed: int) -> Any:
    return tiny()


def view(**changes: Any) -> PromptView:
    """A random layer's attention over 400 tokens."""
    total, asked = 400, 400
    at = torch.arange(total)
    return PromptView(
        **{
            "queries": torch.randn(1, 4, asked, DIM),
            "keys": torch.randn(1, HEADS, total, DIM) * 3 * 0.75 ** torch.arange(DIM),
            "values": torch.randn(1, HEADS, total, DIM),
            "scaling": DIM**-0.5,
            "softcap": None,
            "sink_logits": None,
            "visible": lambda part: (at <= at[part, None])[None, None],
            "module": tiny().model.layers[0].self_attn,
            "n_sink": SINKS,
            "recent_window": WINDOW,
            **changes,
        }
    )


def quantizers(cache: TieredKVCache) -> list[SelfCalibratedQuantizer]:
    tiers = [tier for layer in cache.tiered for tier in layer.plan.ladder.tiers]
    return [quantizer for tier in tiers for quantizer in (tier.keys, tier.values)]  # type: ignore[misc]


class Listener(TelemetrySink):
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    @property
    def reasons(self) -> list[str]:
        return [str(event.detail["reason"]) for event in self.events if event.kind == "fallback"]


@torch.no_grad()
def steps(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(ids[:, at : at + 1], past_key_values=cache).logits for at in range(ids.shape[1])], 1)


@torch.no_grad()
def test_what_kernels_read_is_made_as_it_is_learnt(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the first step: that may be recorded as a CUDA graph, in whose memory nothing made once may lie."""
    made: list[int] = []

    def counted(*args: Any) -> PlaneLayout:
        made.append(len(made))
        return PlaneLayout(*args)

    monkeypatch.setattr("fade_quant_rotated.calibrated.PlaneLayout", counted)
    side = {"kind": "self-calibrated", "bits": 2.5, "widths": (0, 2, 4, 6, 8), "levels": "uniform"}
    ids = torch.randint(1, VOCAB, (1, 300))
    with create_tiered_cache(model, FadeConfig(**FIELDS | {"tile": 64, "keys": side, "values": side})) as cache:
        model(ids[:, :200], past_key_values=cache)
        assert len(made) == 2 * LAYERS
        steps(model, cache, ids[:, 200:280])
        assert all(quantizer.planes() is not None for quantizer in quantizers(cache))
    assert len(made) == 2 * LAYERS


# --- what is learnt ---
@pytest.mark.parametrize("kind", ["Llama", "Gemma2", "GptOss"])
def test_moments_are_those_that_calibration_finds(kind: str, seed: int) -> None:
    """With every query looked at and no weight spread evenly: soft caps and attention sinks included."""
    changes: dict[str, Any] = {}
    if kind == "GptOss":
        changes = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 40}
    if kind == "Gemma2":
        changes = {"sliding_window": 40, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}
    model = tiny(kind, attn_implementation="eager", **changes)
    ids = torch.randint(1, VOCAB, (1, 300))
    collector = Collector(SINKS, WINDOW)
    with watching(model, collector), torch.no_grad():
        model(ids, use_cache=False)
    wanted = collector.moments()
    found: dict[int, LayerMoments] = {}

    def observe(self: Any, prompt: PromptView) -> None:
        every = {"queries": 10**6, "even": 0.0, "drift": 0.0, "shrink": 0.0}
        found[prompt.layer], _ = moments_of(replace(prompt, rope=None), **every)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(SelfCalibratedQuantizer, "observe", observe)
        with create_tiered_cache(model, FadeConfig(**FIELDS)) as cache:
            model(ids, past_key_values=cache)
    assert sorted(found) == sorted(wanted) and found
    for layer, moments in wanted.items():
        for name, tensor in vars(moments).items():
            mine = getattr(found[layer], name)
            if name.endswith("_weight"):  # calibration divides them by the residual stream's size
                mine, tensor = mine / mine.sum(), tensor / tensor.sum()
            torch.testing.assert_close(mine, tensor, rtol=2e-3, atol=2e-3 * float(tensor.abs().max()), msg=name)


def test_padding_is_not_learnt_from_and_rows_add_up(seed: int) -> None:
    once, pad = view(), 37
    alone, _ = moments_of(once, queries=100, shrink=0.0)
    padded = [
        torch.nn.functional.pad(t, (0, 0, pad, 0), value=9.0).expand(2, -1, -1, -1)
        for t in (once.queries, once.keys, once.values)
    ]
    at = torch.arange(400 + pad)
    seen = (at <= at[:, None]) & (at >= pad)
    tokens = dict(zip(("queries", "keys", "values"), padded, strict=True))
    twice, _ = moments_of(replace(once, **tokens, visible=lambda part: seen[part][None, None]), queries=200, shrink=0.0)
    for name, tensor in vars(alone).items():
        factor = 2 if name.endswith("_weight") else 1
        torch.testing.assert_close(
            getattr(twice, name), factor * tensor, rtol=1e-4, atol=1e-5 * float(tensor.abs().max())
        )


def test_a_chunks_queries_are_its_newest_tokens(seed: int) -> None:
    whole = view()
    first = replace(whole, **{n: getattr(whole, n)[:, :, :250] for n in ("queries", "keys", "values")})
    first = replace(first, visible=lambda part: whole.visible(part)[..., :250])
    rest = replace(whole, queries=whole.queries[:, :, 250:], visible=lambda part: whole.visible(part + 250))
    a, b, c = (moments_of(v, queries=10**6, even=0.0)[0] for v in (whole, first, rest))
    torch.testing.assert_close(a.key_weight, b.key_weight + c.key_weight, rtol=1e-4, atol=0)
    torch.testing.assert_close(a.value_weight, b.value_weight + c.value_weight, rtol=1e-4, atol=0)


def test_what_cannot_be_learnt_from_is_named(seed: int) -> None:
    assert Learning(view(), 397, 0).found == "the prompt has 396 tokens outside the sinks, 397 are needed to learn from"
    few = replace(view(), queries=torch.randn(1, 4, 3, DIM), visible=lambda part: view().visible(part + 397))
    assert Learning(few, 7, 0).found == "3 tokens came at once, 4 are needed to learn what is asked of a layer"
    for name in ("queries", "keys", "values"):
        broken = view()
        getattr(broken, name)[0, 1, 333] = torch.nan
        assert Learning(broken, 1, 0).found == "the prompt's attention is not finite", name
    strange, _ = moments_of(view(module=torch.nn.Linear(3, 3)))  # no output projection: errors count as they are
    assert torch.equal(strange.metric[0], torch.eye(DIM, dtype=torch.float64))
    broken = tiny().model.layers[0].self_attn
    torch.nn.init.constant_(broken.o_proj.weight, torch.inf)
    assert torch.equal(moments_of(view(module=broken))[0].metric, strange.metric)


def test_covariances_of_few_tokens_are_drawn_to_their_diagonals(seed: int) -> None:
    whole = view()
    for tokens, share in ((DIM, 1 - 0.8 * 0.75), (9 * DIM, 1 - 0.8 * 0.99)):
        cut = {name: getattr(whole, name)[:, :, : tokens + SINKS] for name in ("queries", "keys", "values")}
        few = replace(whole, **cut, visible=lambda part, n=tokens + SINKS: whole.visible(part)[..., :n])
        plain, found = (moments_of(few, shrink=factor)[0] for factor in (0.0, 1.0))
        for name in ("key_cov", "value_cov"):
            before, after = getattr(plain, name), getattr(found, name)
            apart = ~torch.eye(DIM, dtype=torch.bool)
            torch.testing.assert_close(after.diagonal(dim1=-2, dim2=-1), before.diagonal(dim1=-2, dim2=-1))
            torch.testing.assert_close(after[:, apart], (1 - share) * before[:, apart])


def test_a_head_that_attends_to_nothing_but_sinks_gets_a_transform(seed: int) -> None:
    blind = view()
    blind.keys[0, 1] = -50.0
    blind.keys[0, 1, 0] = 50.0
    blind.queries[0, 2:] = blind.queries[0, 2:].abs() + 1
    quantizer = SelfCalibratedQuantizer(DIM, bits=3.0)
    quantizer.observe(blind)
    state = quantizer.state_dict()
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    error = quantizer.decode(quantizer.encode(blind.keys)) - blind.keys
    assert float(error[0, 0].norm() / blind.keys[0, 0].norm()) < 0.3


def test_a_mean_that_later_positions_turn_is_not_taken_for_constant(seed: int) -> None:
    """Keys that the prompt shows at one angle are still coded after the rotary embedding has turned them."""
    shown = view()
    shown.keys[..., [5, 5 + DIM // 2]] = torch.tensor([6.0, 1.0]) + 0.01 * torch.randn(1, HEADS, 400, 2)
    later = shown.keys.clone()
    later[..., 5], later[..., 5 + DIM // 2] = -shown.keys[..., 5 + DIM // 2], shown.keys[..., 5]
    quantizer = SelfCalibratedQuantizer(DIM, 3.0)
    quantizer.observe(shown)
    for keys in (shown.keys, later):
        error = quantizer.decode(quantizer.encode(keys)) - keys
        assert float(error[..., [5, 5 + DIM // 2]].square().mean()) < 0.2 * 18.5


# --- bits ---
@pytest.mark.parametrize(
    ("bits", "widths", "group"), [(2.0, (0, 1, 2, 3, 4), 1), (1.3, (0, 2, 4), 4), (7.9, (0, 8), 1)]
)
@pytest.mark.parametrize("side", ["key", "value"])
def test_bits_are_a_bound_that_is_nearly_met(bits: float, widths: tuple, group: int, side: str, seed: int) -> None:
    quantizer = SelfCalibratedQuantizer(DIM, bits, side, widths, group)
    for begin in (quantizer.forget, lambda: quantizer.observe(view())):
        begin()
        packed = quantizer.encode(torch.randn(3, HEADS, 150, DIM))
        assert packed.nbytes * 8 / (3 * HEADS * 192 * DIM) == pytest.approx(quantizer.bits_per_element, rel=1e-9)
        used = float(quantizer.widths.double().mean()) + 4 / DIM
        assert bits - group * max(widths) / (HEADS * DIM) - 0.02 <= used <= quantizer.bits_per_element <= bits
        assert set(quantizer.widths.unique().tolist()) <= set(widths)


def test_channels_that_matter_get_the_bits(seed: int) -> None:
    shown = view()
    learnt, plain = SelfCalibratedQuantizer(DIM, 2.5), SelfCalibratedQuantizer(DIM, 2.5)
    learnt.observe(shown)
    errors = []
    for quantizer in (learnt, plain):
        decoded = quantizer.decode(quantizer.encode(shown.keys))
        logits = shown.queries.unflatten(1, (HEADS, -1)) @ (decoded - shown.keys)[:, :, None].transpose(-1, -2)
        errors.append(float(logits.square().mean()))
    assert errors[0] < 0.5 * errors[1], errors


def test_configuration_refuses_and_says_why() -> None:
    with pytest.raises(ConfigError, match=r"key quantizer of layer 0.*gains take 0\.250"):
        get_quantizer("self-calibrated", head_dim=DIM, bits=0.2)
    with pytest.raises(ConfigError, match=r"widths \[0, 2\]"):
        get_quantizer("self-calibrated", head_dim=DIM, bits=3, widths=(0, 2))
    with pytest.raises(ConfigError, match=r"no room for a plane.* of 2 heads; ask for 1\.25 or more"):
        get_quantizer("self-calibrated", head_dim=DIM, bits=8 / DIM, widths=(0, 2), levels="uniform", num_kv_heads=2)
    get_quantizer("self-calibrated", head_dim=DIM, bits=1.25, widths=(0, 2), levels="uniform", num_kv_heads=2)
    with pytest.raises(ConfigError, match="group=5 must divide"):
        get_quantizer("self-calibrated", head_dim=DIM, group=5)
    with pytest.raises(ConfigError, match="must hold 0"):
        get_quantizer("self-calibrated", head_dim=DIM, widths=(2, 4))


@pytest.mark.slow
def test_conformance(seed: int) -> None:
    about_a_mean = {"extreme_values": "tokens are coded about a mean: zeros come back as a small error"}
    results = check_quantizer("self-calibrated", seed=seed, expected_failures=about_a_mean)
    assert all(result.passed for result in results), [r for r in results if not r.passed]


# --- in a cache ---
@pytest.mark.parametrize("more", [{}, {"policy": {"kind": "h2o", "budget": 0.6, "every": 16}}], ids=["all", "h2o"])
def test_every_stored_token_is_the_one_its_position_says(model: Any, more: dict) -> None:
    ids = torch.randint(1, VOCAB, (2, 320))
    mask = torch.ones_like(ids)
    mask[0, :23] = 0
    where = {"attention_mask": mask[:, :280], "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)[:, :280]}
    exact, listener = transformers.DynamicCache(config=model.config), Listener()
    with create_tiered_cache(model, FadeConfig(**FIELDS, **more)) as cache, torch.no_grad():
        attach_telemetry(cache, listener)
        model(ids[:, :280], past_key_values=exact, **where)
        model(ids[:, :280], past_key_values=cache, **where)
        for layer, held in zip(cache.tiered, exact.layers, strict=True):
            (store,) = layer.held.stores
            positions = store.live_positions()
            assert store.tiles
            for found, wanted in zip((store.decode(0), store.decode(1)), (held.keys, held.values), strict=True):
                live = positions >= 0
                index = positions.clamp_min(0)[..., None].expand(-1, -1, -1, DIM)
                true = wanted.gather(2, index)[live]
                assert float((found[live] - true).norm() / (true - true.mean(0)).norm()) < 0.25
    assert not listener.reasons


@pytest.mark.slow
def test_a_reset_cache_learns_anew_and_a_saved_one_goes_on(model: Any, tmp_path: Path) -> None:
    first, second = torch.randint(1, VOCAB, (2, 1, 300))
    with create_tiered_cache(model, FadeConfig(**FIELDS)) as cache, torch.no_grad():
        model(first, past_key_values=cache)
        learnt = [q.state_dict() for q in quantizers(cache)]
        cache.reset()
        model(second, past_key_values=cache)
        again = steps(model, cache, second[:, :30])
        report = cache.memory_report()
        assert sum(row.nbytes for row in report.rows if ".state." in row.kind) == sum(
            q.state_bytes() for q in quantizers(cache)
        )
        cache.save(tmp_path / "cache.safetensors")
        with TieredKVCache.load(tmp_path / "cache.safetensors", model) as loaded:
            more = steps(model, loaded, first[:, :80])
        assert torch.equal(more, steps(model, cache, first[:, :80]))
        for was, now in zip(learnt, quantizers(cache), strict=True):
            assert not torch.equal(was["mean"], now.state_dict()["mean"])
    with create_tiered_cache(model, FadeConfig(**FIELDS)) as fresh, torch.no_grad():
        model(second, past_key_values=fresh)
        assert torch.equal(again, steps(model, fresh, second[:, :30]))


@pytest.mark.slow
def test_a_short_prompt_makes_do_with_a_rotation_and_says_so(model: Any) -> None:
    ids, listener = torch.randint(1, VOCAB, (1, 300)), Listener()
    exact = transformers.DynamicCache(config=model.config)
    with create_tiered_cache(model, FadeConfig(**FIELDS)) as cache, torch.no_grad():
        attach_telemetry(cache, listener)
        for each in (cache, exact):
            model(ids[:, :15], past_key_values=each)
        assert not any(q.state_dict() for q in quantizers(cache))
        found, wanted = (steps(model, each, ids[:, 15:]).softmax(-1) for each in (cache, exact))
        assert cache.tiered[0].held.stores[0].tiles
        assert float((found - wanted).abs().sum(-1).mean()) < 0.05
    assert listener.reasons == LAYERS * [
        "the prompt has 11 tokens outside the sinks, 16 are needed to learn from: a plain rotation makes do"
    ]


def test_the_first_chunk_that_is_long_enough_is_learnt_from(model: Any) -> None:
    ids, listener = torch.randint(1, VOCAB, (1, 300)), Listener()
    with create_tiered_cache(model, FadeConfig(**FIELDS)) as cache, torch.no_grad():
        attach_telemetry(cache, listener)
        model(ids[:, :18], past_key_values=cache)
        assert not any(q.state_dict() for q in quantizers(cache))
        model(ids[:, 18:60], past_key_values=cache)  # still in the window, yet enough to learn from
        assert all(q.state_dict() for q in quantizers(cache))
        learnt = [q.state_dict() for q in quantizers(cache)]
        for at in range(60, 65):  # decoding is not learnt from
            model(ids[:, at : at + 1], past_key_values=cache)
        for quantizer, state in zip(quantizers(cache), learnt, strict=True):
            assert all(torch.equal(state[name], tensor) for name, tensor in quantizer.state_dict().items())
        model(ids[:, 65:105], past_key_values=cache)  # the last chunk before anything is encoded
        assert not any(
            torch.equal(q.state_dict()["mean"], s["mean"]) for q, s in zip(quantizers(cache), learnt, strict=True)
        )
        model(ids[:, 105:200], past_key_values=cache)
        states = [q.state_dict() for q in quantizers(cache)]
        model(ids[:, 200:], past_key_values=cache)
        for quantizer, state in zip(quantizers(cache), states, strict=True):
            assert all(torch.equal(state[name], tensor) for name, tensor in quantizer.state_dict().items())
    assert not listener.reasons


def test_stock_attention_shows_no_prompt(model: Any) -> None:
    ids, listener = torch.randint(1, VOCAB, (1, 200)), Listener()
    with create_tiered_cache(model, FadeConfig(**FIELDS, attention="stock")) as cache, torch.no_grad():
        attach_telemetry(cache, listener)
        model(ids, past_key_values=cache)
        assert cache.tiered[0].held.stores[0].tiles
    assert set(listener.reasons) == {"tokens had to be encoded before a prompt was seen: a plain rotation makes do"}


@pytest.mark.parametrize(
    "mode", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"prefill_chunk_size": 50}]
)
def test_modes_of_generate(model: Any, mode: dict, seed: int) -> None:
    ids = torch.randint(1, VOCAB, (2, 200))
    ids[0, :30] = 0
    mask = (torch.arange(200) >= torch.tensor([[30], [0]])).long()
    with create_tiered_cache(model, FadeConfig(**FIELDS)) as cache:
        out = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=70, min_new_tokens=70, **mode
        )
        assert out.shape[1] == 270 and cache.tiered[0].held.stores[0].tiles
        assert all(q.state_dict() for q in quantizers(cache))


def test_a_state_that_does_not_fit_is_refused(seed: int) -> None:
    quantizer = SelfCalibratedQuantizer(DIM, 3.0)
    quantizer.observe(view())
    state = quantizer.state_dict()
    other = SelfCalibratedQuantizer(DIM, 3.0)
    for change, words in (
        ({"widths": state["widths"] + 1}, "3.00 on average|2.75 on average"),
        ({"widths": state["widths"][:, 1:]}, "are needed"),
        ({"mean": state["mean"][:1]}, "mean"),
    ):
        with pytest.raises(CheckpointError, match=words):
            other.load_state_dict({**state, **change})
        assert not other.state_dict()
    with pytest.raises(CheckpointError, match="saved state has None"):
        other.load_state_dict({"mean": state["mean"]})
    other.load_state_dict(state)
    other.load_state_dict({})
    assert not other.state_dict()


@pytest.mark.parametrize(("bits", "dim", "tile"), [(2.1, 128, 64), (2.1, 64, 64), (1.7, 80, 128), (3.3, 256, 64)])
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_rows_are_of_whole_planes(bits: float, dim: int, tile: int, heads: int) -> None:
    planes = SelfCalibratedQuantizer(dim, bits, widths=(0, 2, 4, 6, 8), tile=tile, levels="uniform", heads=heads)
    fine = SelfCalibratedQuantizer(dim, bits, tile=tile)
    assert planes.row % 16 == 0
    assert fine.row - 16 - 2 * tile / heads < planes.row <= fine.row
    assert planes.bits_per_element <= bits
    planes.encode(torch.randn(1, heads, tile, dim))
    assert planes.layout.row == planes.row
    assert int(planes.widths.sum()) == planes.row * heads // (2 * tile) * 32
