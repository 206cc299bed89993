from __future__ import annotations

import pytest
import torch
from oracle import relative_error, seed
from transformers import LlamaConfig, LlamaForCausalLM

from fade_core import FadeConfig, FullSegment, create_tiered_cache
from fade_core.builtin.quantizers.uniform import UniformQuantizer
from fade_core.errors import InputError
from fade_core.interfaces import Event, TelemetrySink, Tier
from fade_core.ops.reference import PackedSegment, decode_attention
from fade_core.packed import Packed, PackedFormat
from fade_core.storage.slots import TokenLayout
from fade_core.storage.tier_store import TierStore, Tokens
from fade_core.testing import check_kernel
from fade_kernels_triton.kernel import TritonDecodeAttention, merged

KERNEL = TritonDecodeAttention()


class Events(TelemetrySink):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def reasons(self) -> set[str]:
        return {e.detail["reason"] for e in self.events if e.kind == "fallback"}


class Turned(UniformQuantizer):
    """Codes of rotated tokens about a mean: what a calibrated quantizer asks of a kernel."""

    def __init__(self, dim: int, side: str, bits: int = 4) -> None:
        super().__init__(dim, bits, "token", layout="token" if side == "key" else "channel")
        self.turn = torch.linalg.qr(torch.randn(dim, dim)).Q
        self.mean = torch.randn(dim)

    def encode(self, x):
        packed = super().encode((x.float() - self.mean.to(x.device)) @ self.turn.to(x.device))
        return Packed(packed.fields, packed.length, x.dtype)

    def decode(self, packed):
        plain = super().decode(Packed(packed.fields, packed.length, torch.float64))
        turn, mean = self.turn.to(plain), self.mean.to(plain)
        return (plain @ turn.T + mean).to(packed.dtype)

    def scores(self, query, packed):
        return query @ self.decode(Packed(packed.fields, packed.length, query.dtype)).transpose(-1, -2)

    def combine(self, weights, packed):
        return weights @ self.decode(Packed(packed.fields, packed.length, weights.dtype))

    def transform_query(self, query):
        return query @ self.turn.to(query.device)

    def query_bias(self, query):
        return query @ self.mean[:, None].to(query.device)

    def transform_output(self, output, weight_sum):
        return output @ self.turn.T.to(output.device) + weight_sum * self.mean.to(output.device)


def store_of(keys, values, tiles, *, rows=2, heads=2, dim=64, device="cpu"):
    store = TierStore(
        Tier("t", "rest", keys, values), rows, TokenLayout(heads, torch.float16, torch.device(device)), False
    )
    length = tiles * keys.tile
    counts = torch.full((rows, heads), length)
    counts[-1] = max(0, length - keys.tile - 7)
    tokens = [torch.randn(rows, heads, length, dim, device=device).half() for _ in range(2)]
    store.append(Tokens(*tokens, torch.arange(length, device=device).expand(rows, 1, -1), counts, {}))
    return store


def packed(store, queries=1):
    live = store.view().valid()
    return PackedSegment(
        store.view(), None if live is None else live[:, :, None].expand(-1, -1, queries, -1), plain=True
    )


def tiny_llama(device: str) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97, hidden_size=256, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, attn_implementation="sdpa",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().to(device, torch.float16)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            weight.data *= 3  # attention that decides something
    return model


def config_of(kernel: str, tiers: str = "one") -> FadeConfig:
    kernels = {"kind": kernel, "encode": "torch", "dequantize": "torch"}  # interpreted, prompts take long
    fields: dict[str, object] = {"n_sink": 2, "recent_window": 16, "kernel": kernels}
    if tiers == "two":
        fields["ladder"] = [{"tier": "int4", "capacity": 64}, {"tier": "int2", "capacity": "rest"}]
        fields["policy"] = {"kind": "position", "every": 16}
    if tiers == "balanced":
        fields |= {side: FadeConfig.balanced().model_dump()[side] for side in ("keys", "values")}
    return FadeConfig.model_validate(fields)


def generate(model, kernel, ids, *, tiers="one", **options):
    cache = create_tiered_cache(model, config_of(kernel, tiers))
    sink = Events()
    cache.sinks.append(sink)
    with cache:
        out = model.generate(
            ids, past_key_values=cache, do_sample=False, return_dict_in_generate=True, output_logits=True,
            **{"max_new_tokens": 4, "min_new_tokens": 4, **options},
        )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1).float(), sink


def agree(found, wanted, prompt: int) -> None:
    """Logits agree, and tokens too, up to a step where the oracle's best two are within the tolerance."""
    for row in range(found[0].shape[0]):
        for step in range(wanted[1].shape[1]):
            mine, theirs = found[1][row, step], wanted[1][row, step]
            tolerance = 0.02 * float(theirs.std())  # fp16 activations through two layers
            assert float((mine - theirs).abs().max()) < tolerance, f"row {row}, step {step}"
            if found[0][row, prompt + step] != wanted[0][row, prompt + step]:
                best = theirs.topk(2).values
                assert float(best[0] - best[1]) < 2 * tolerance, f"row {row}, step {step}"
                break  # another token from here on


@pytest.mark.slow
@pytest.mark.parametrize("codes", ["safe", "balanced"])
def test_conformance(device, codes):
    """All checks with one format and dtype; two with the formats of ``balanced`` and the other dtype."""
    config, safe = getattr(FadeConfig, codes)(), codes == "safe"
    results = check_kernel(
        KERNEL, device=device, dtype=torch.float16 if safe else torch.bfloat16, seed=seed(), keys=config.keys,
        values=config.values, only=() if safe else ("agreement", "softcap_and_sinks"),
    )  # fmt: skip
    assert any(result.passed for result in results)
    assert all(result.passed for result in results), [r for r in results if not r.passed]


@pytest.mark.slow
@pytest.mark.parametrize("tiers", ["one", "two", "balanced"])
def test_generates_what_the_oracle_generates(device, tiers):
    torch.manual_seed(seed())
    model = tiny_llama(device)
    ids = torch.randint(0, 97, (1, 144), device=device)  # the second step fills a tile, which is encoded
    wanted = generate(model, "torch", ids, tiers=tiers)
    found = generate(model, "triton", ids, tiers=tiers)
    assert not found[2].reasons()
    assert any(e.kind == "encode" for e in found[2].events[-4:])
    agree(found, wanted, 144)


def test_generates_with_padded_rows(device):
    torch.manual_seed(seed())
    model = tiny_llama(device)
    ids = torch.randint(0, 97, (2, 106), device=device)
    mask = torch.ones_like(ids)
    mask[0, :73] = 0
    wanted = generate(model, "torch", ids, attention_mask=mask)
    found = generate(model, "triton", ids, attention_mask=mask)
    assert not found[2].reasons()
    agree(found, wanted, 106)


@pytest.mark.slow
def test_generates_from_looked_up_candidates(device):
    torch.manual_seed(seed())
    model = tiny_llama(device)
    ids = torch.randint(0, 97, (1, 40), device=device).repeat(1, 3)
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 6, "min_new_tokens": 6}
    wanted = generate(model, "torch", ids, **options)
    found = generate(model, "triton", ids, **options)
    assert not found[2].reasons()
    agree(found, wanted, 120)


@torch.no_grad()
def test_what_it_refuses_falls_back_once_a_layer_and_is_told(device):
    torch.manual_seed(seed())
    model = tiny_llama(device)
    ids = torch.randint(0, 97, (1, 120), device=device)
    logits = {}
    sinks = {}
    for kernel in ("torch", "triton"):
        with create_tiered_cache(model, config_of(kernel)) as cache:
            sinks[kernel] = Events()
            cache.sinks.append(sinks[kernel])
            model(ids[:, :80], past_key_values=cache)
            model(ids[:, 80:92], past_key_values=cache)
            model(ids[:, 92:104], past_key_values=cache)
            hidden = torch.ones(1, 105, dtype=torch.long, device=device)
            hidden[0, 30:34] = 0  # stored tokens that the caller hides
            logits[kernel] = model(ids[:, 104:105], attention_mask=hidden, past_key_values=cache).logits
    assert torch.equal(logits["torch"], logits["triton"])
    reasons = [
        (e.layer, e.detail["kernel"], e.detail["reason"]) for e in sinks["triton"].events if e.kind == "fallback"
    ]
    assert reasons == [
        (layer, "triton", reason)
        for reason in ("12 query tokens (it takes 1 to 8)", "a mask that hides stored tokens")
        for layer in range(2)
    ]
    assert not sinks["torch"].reasons()


@pytest.mark.parametrize("queries", [1, 3])
def test_tiers_with_a_space_of_their_own(device, queries):
    seed()
    turned = store_of(Turned(64, "key"), Turned(64, "value"), 3, device=device)
    plain = store_of(
        UniformQuantizer(64, 2, "token"), UniformQuantizer(64, 2, "token", layout="channel"), 2, device=device
    )
    window = [torch.randn(2, 2, 21, 64, device=device).half() for _ in range(2)]
    seen = (torch.arange(21) <= torch.arange(21 - queries, 21)[:, None]).to(device)[None, None]
    query = torch.randn(2, 6, queries, 64, device=device).half()
    sinks = torch.randn(6, device=device)
    for segments in (
        [packed(turned, queries), packed(plain, queries), FullSegment(*window, seen, plain=True)],
        [packed(turned, queries)],
    ):
        wanted = decode_attention(query.double(), segments, 0.2, sinks=sinks)
        found = KERNEL(query, segments, 0.2, sinks=sinks)
        assert found.output.dtype == query.dtype
        assert relative_error(found.output, wanted.output) < 2e-3
        torch.testing.assert_close(found.lse.double(), wanted.lse, atol=4e-3, rtol=2e-3)


def test_a_soft_cap_over_a_mean_is_refused(device):
    seed()
    store = store_of(Turned(64, "key"), Turned(64, "value"), 2, device=device, rows=1)
    query = torch.randn(1, 2, 1, 64, device=device).half()
    assert "mean" in KERNEL.accepts(query, [packed(store)], 0.1, softcap=5.0).reason
    with pytest.raises(InputError, match="mean"):
        KERNEL(query, [packed(store)], 0.1, softcap=5.0)


def test_empty_rows_have_no_mass(device):
    seed()
    keys, values = UniformQuantizer(64, 4, "channel"), UniformQuantizer(64, 4, "token", layout="channel")
    store = store_of(keys, values, 1, device=device, rows=2)  # the last row holds nothing
    query = torch.randn(2, 2, 1, 64, device=device).half()
    found = KERNEL(query, [packed(store)], 0.1)
    assert bool((found.lse[1] == -torch.inf).all())
    assert bool((found.output[1] == 0).all())
    assert bool(found.output[0].isfinite().all())


def test_merging_parts_of_nothing():
    outputs = torch.randn(2, 1, 2, 1, 8)
    lse = torch.tensor([[[[0.3], [-torch.inf]]], [[[-torch.inf], [-torch.inf]]]])
    output, total = merged([(outputs[0], lse[0]), (outputs[1], lse[1])])
    torch.testing.assert_close(output[0, 0], outputs[0, 0, 0])
    assert bool((output[0, 1] == 0).all())
    assert total[0, 0, 0] == pytest.approx(0.3)
    assert total[0, 1, 0] == -torch.inf


def test_supports_says_why_not():
    fmt = UniformQuantizer(128, 4, "channel").format
    answers = {
        "head_dim": KERNEL.supports(fmt, 72, torch.device("cpu"), torch.float16),
        "meta": KERNEL.supports(fmt, 128, torch.device("meta"), torch.float16),
        "float32": KERNEL.supports(fmt, 128, torch.device("cpu"), torch.float32),
        "level table": KERNEL.supports(
            PackedFormat(2, 128, levels=(-1.5, -0.4, 0.4, 1.5)), 128, torch.device("cpu"), torch.float16
        ),
        "head_dim 72": KERNEL.supports(None, 72, torch.device("cpu"), torch.float16),
    }
    for reason, answer in answers.items():
        assert not answer
        assert reason in answer.reason or "Triton" in answer.reason or "CUDA" in answer.reason
