from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fade_core.errors import ConfigError, InputError, NonFiniteError, UnsupportedModelError
from fade_core.interfaces import QuantizerContext
from fade_quant_rotated import CalibratedConfig
from fade_quant_rotated.calibrate import calibrate, sketch_of, watching
from fade_quant_rotated.commands import cut, parse_widths
from fade_quant_rotated.statistics import Collector, output_projection

transformers = pytest.importorskip("transformers")


def tiny(kind: str = "Llama", **changes: object) -> torch.nn.Module:
    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 512,
        **changes,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def texts(count: int = 3, length: int = 150) -> list[torch.Tensor]:
    return [torch.randint(97, (length,)) for _ in range(count)]


@pytest.mark.parametrize("kind", ["Llama", "Qwen3", "Gemma2", "GptOss"])
def test_watching_does_not_change_what_the_model_computes(kind: str, seed: int) -> None:
    changes: dict[str, object] = {}
    if kind == "GptOss":
        changes = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 40}
    if kind == "Gemma2":
        changes = {"sliding_window": 40, "query_pre_attn_scalar": 12}
    model = tiny(kind, attn_implementation="eager", **changes)
    ids = torch.randint(97, (1, 150))
    with torch.no_grad():
        wanted = model(ids).logits
        collector = Collector(4, 16, block=64)
        with watching(model, collector):
            found = model(ids, use_cache=False).logits
        after = model(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert torch.equal(after, wanted)
    full = [
        i
        for i, t in enumerate(getattr(model.config, "layer_types", None) or ["full_attention"] * 2)
        if t == "full_attention"
    ]
    assert sorted(collector.moments()) == full


def test_statistics_equal_the_formula(seed: int) -> None:
    """Against a plain float64 computation over the whole attention matrix."""
    model = tiny().double()
    ids = torch.randint(97, (1, 90))
    sinks, window = 4, 10
    seen: dict[str, torch.Tensor] = {}
    collector = Collector(sinks, window, block=32)
    inner = collector.attention

    def spying(module, query, key, value, *rest):  # type: ignore[no-untyped-def]
        if module.layer_idx == 1:
            seen.update(q=query[0].double(), k=key[0].double(), v=value[0].double())
            seen["wo"] = module.o_proj.weight.detach()
        return inner(module, query, key, value, *rest)

    collector.attention = spying  # type: ignore[method-assign]
    with watching(model, collector), torch.no_grad():
        model(ids, use_cache=False)
    found = collector.moments()[1]
    heads, length, dim = seen["k"].shape
    at = torch.arange(length)
    middle = (at[None] >= sinks) & (at[None] <= at[:, None] - window)
    q = seen["q"].unflatten(0, (heads, -1)) * dim**-0.5
    for h in range(heads):
        weights, squares, metric, plain = (
            torch.zeros(length),
            torch.zeros(dim, dim),
            torch.zeros(dim, dim),
            torch.zeros(length),
        )
        weights, squares, metric, plain = (t.double() for t in (weights, squares, metric, plain))
        for g in range(q.shape[1]):
            a = (q[h, g] @ seen["k"][h].T).masked_fill(at[None] > at[:, None], -torch.inf).softmax(-1)
            wo = seen["wo"][:, (h * q.shape[1] + g) * dim : (h * q.shape[1] + g + 1) * dim]
            moved = ((seen["v"][h][None] - (a @ seen["v"][h])[:, None]) @ wo.T).square().sum(-1)
            w = a.square() * moved * middle
            weights += w.sum(0)
            plain += (a.square() * middle).sum(0)
            squares += (q[h, g] * w.sum(1, keepdim=True)).T @ q[h, g]
            metric += wo.T @ wo / q.shape[1]
        mean = (weights[:, None] * seen["k"][h]).sum(0) / weights.sum()
        centred = seen["k"][h] - mean
        cov = (centred * weights[:, None]).T @ centred / weights.sum()
        close = {"rtol": 2e-4, "atol": 1e-6}
        torch.testing.assert_close(found.key_mean[h], mean, **close)
        torch.testing.assert_close(found.key_cov[h], cov, rtol=2e-3, atol=2e-4 * float(cov.abs().max()))
        torch.testing.assert_close(
            found.query_square[h],
            squares / weights.sum(),
            rtol=1e-3,
            atol=1e-3 * float(squares.abs().max() / weights.sum()),
        )
        torch.testing.assert_close(found.metric[h], metric, **close)
        value_mean = (plain[:, None] * seen["v"][h]).sum(0) / plain.sum()
        torch.testing.assert_close(found.value_mean[h], value_mean, rtol=2e-4, atol=1e-5)
        unweighted = (seen["k"][h, sinks:] - mean).T @ (seen["k"][h, sinks:] - mean) / (length - sinks)
        torch.testing.assert_close(
            found.key_spread[h], unweighted, rtol=1e-3, atol=1e-4 * float(unweighted.abs().max())
        )


@pytest.mark.slow
def test_calibration_repeats_bit_for_bit(tmp_path: Path, seed: int) -> None:
    model, read = tiny(), texts()
    files = []
    for name in ("a", "b"):
        found = calibrate(model, read, bits=3.0, sinks=4, window=16)
        path = tmp_path / f"{name}.safetensors"
        found.save(path)
        files.append(path.read_bytes())
    assert files[0] == files[1]
    config = CalibratedConfig(file=str(tmp_path / "a.safetensors"))
    total = 0.0
    for layer in range(2):
        for side in ("key", "value"):
            total += config.build(QuantizerContext(12, side, 64, layer, 2, 2)).bits_per_element
    assert 2.5 < total / 4 <= 3.0
    torch.testing.assert_close(sketch_of(model), found.sketch)
    found.check_model(sketch_of(model))


def test_refusals_say_what_to_do(seed: int) -> None:
    model = tiny()
    with pytest.raises(InputError, match=r"too few to calibrate 12 channels.*longer texts"):
        calibrate(model, texts(1, 100))
    with pytest.raises(InputError, match="longer than sinks and window"):
        calibrate(model, texts(3, 60))
    with pytest.raises(InputError, match="no text"):
        calibrate(model, [])
    with pytest.raises(ConfigError, match="widths"):
        calibrate(model, texts(), bits=4, widths=(0, 2))
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    before = model.config._attn_implementation
    with pytest.raises(NonFiniteError, match=r"keys of layer 1.*float32 or bfloat16"):
        calibrate(model, texts())
    assert model.config._attn_implementation == before


def test_an_output_projection_that_cannot_be_used_is_refused(seed: int) -> None:
    model = tiny()
    last = model.model.layers[1].self_attn
    last.o_proj.weight.data[3, 5] = torch.inf  # nothing downstream of it would show
    with pytest.raises(NonFiniteError, match=r"output projection.*Check the weights"):
        calibrate(model, texts())
    last.o_proj.weight = torch.nn.Parameter(torch.zeros(48, 48, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"int8.*float32 or bfloat16"):
        output_projection(last, 48)
    assert sketch_of(model) is None
    last.o_proj.weight = torch.nn.Parameter(torch.zeros(48, 48, device="meta"))
    with pytest.raises(UnsupportedModelError, match="meta"):
        output_projection(last, 48)
    assert sketch_of(model) is None


def test_models_that_cannot_be_watched_are_refused_by_name() -> None:
    config = transformers.GPT2Config(vocab_size=97, n_embd=48, n_layer=2, n_head=4)
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*rotated"):
        calibrate(transformers.GPT2LMHeadModel(config).eval(), texts())


def test_pieces_are_spread_over_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    class Words:
        add_bos_token, bos_token_id = True, 7

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            return {"input_ids": [int(word) for word in text.split()]}

    text = " ".join(str(n) for n in range(1000))
    pieces = cut(Words(), [text], 100, 300)
    assert [int(piece[1]) for piece in pieces] == [99, 495, 792] and all(int(p[0]) == 7 for p in pieces)
    assert len(cut(Words(), [text, text], 100, 10_000)) == 20
    assert capsys.readouterr().err == ""
    assert len(cut(Words(), [text, "1 2 3", text], 100, 10_000)) == 20
    assert capsys.readouterr().err.startswith("1 of 3 texts hold fewer than 100 tokens and are left out; --length 4 ")
    with pytest.raises(InputError, match="--length"):
        cut(Words(), [text], 2000, 300)
    with pytest.raises(InputError, match="0,2,4"):
        parse_widths("0-4")
