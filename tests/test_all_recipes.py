"""Measuring with every plugin: each recipe runs, finer ones diverge less, prompts are fed as a policy wants them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tinymodels import VOCABULARY, fresh_seed, tiny

from fade_core import FadeConfig
from fade_core.eval import divergence
from fade_core.interfaces import QuantizerContext
from fade_eval.contenders import contenders
from fade_eval.finer import as_toml, finer_layers
from fade_eval.quality import quality
from fade_quant_rotated.calibrate import calibrate


@pytest.mark.slow
def test_every_recipe_runs_and_costs_what_it_should(tmp_path: Path) -> None:
    seed = fresh_seed()
    model = tiny("llama", seed, torch.float32, head_dim=64, hidden_size=64, num_hidden_layers=2, initializer_range=0.1)
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for start in (0, 64):  # channels that are always large, which a scale a token suffers from
            attention.k_proj.weight[start + 3] *= 20
            attention.k_proj.weight[start + 40] *= 10
    draw = torch.Generator().manual_seed(seed)
    texts = torch.randint(1, VOCABULARY, (12, 400), generator=draw)
    file = tmp_path / "tiny.safetensors"
    calibrate(model, list(texts[:10])).save(file)
    chosen = [c for c in contenders(calibration=str(file)) if c.source == "recipe"]
    found = quality(model, None, chosen, texts[10:], prompt_tokens=390, steps=8, needles=0, batch_size=2)
    assert found.left_out == {}
    row = {row.name: row for row in found.rows}
    assert len(row) == len(chosen) >= 20
    for name in ("KIVI", "TurboQuant"):
        assert row[f"{name} 4"].kl_mean < row[f"{name} 3"].kl_mean < row[f"{name} 2"].kl_mean
    assert row["KIVI 4"].kl_mean < row["int4 a token"].kl_mean
    assert row["calibrated 4.5"].kl_mean < row["calibrated 2.5"].kl_mean < row["calibrated 1.65"].kl_mean
    assert row["calibrated 2.5"].kl_mean < row["int2 a token"].kl_mean
    for bits in ("4.5", "3.5", "2.5", "2.1", "1.65"):
        assert float(bits) - 0.1 < row[f"calibrated {bits}"].bits <= float(bits)
    in_order = sorted((r for r in found.rows if r.name.startswith(("int", "KIVI"))), key=lambda r: r.bits)
    assert [r.bytes_per_token for r in in_order] == sorted(r.bytes_per_token for r in in_order)


def test_quantizers_of_plugins_have_finer_widths(tmp_path: Path) -> None:
    model = tiny("llama", fresh_seed(), torch.float32, head_dim=64)
    texts = [torch.randint(1, VOCABULARY, (300,)) for _ in range(4)]
    calibrate(model, texts, bits=2.0).save(tmp_path / "tiny.safetensors")
    side = {"kind": "calibrated", "file": str(tmp_path / "tiny.safetensors")}
    config = FadeConfig(keys={"kind": "rotated", "bits": 3, "rotation": "orthogonal"}, values=side)
    (override,) = finer_layers(model, config, [1]).values()
    assert override["keys"] == {"kind": "rotated", "bits": 8, "rotation": "orthogonal"}
    bits = override["values"].pop("bits")
    assert override["values"] == side
    built = [
        config.with_overrides(values={**side, "bits": average}).values.build(QuantizerContext(64, "value", 64, 1, 3, 2))
        for average in (2.0, bits)
    ]
    assert built[1].bits_per_element > built[0].bits_per_element
    (tmp_path / "finer.toml").write_text(as_toml({"1": {**override, "values": {**side, "bits": bits}}}))
    assert FadeConfig.from_file(tmp_path / "finer.toml").for_layer(1, 3).values.bits == bits


@pytest.mark.parametrize("heads", ["equal", "shared"])
def test_evaluation_feeds_prompts_as_the_policy_wants(heads: str) -> None:
    """KVzip refuses a prompt that does not come through ``cache.prefill``."""
    policy = {"kind": "kvzip", "budget": 64, "every": 8}
    if heads == "shared":
        policy = {"kind": "adakv", "budget": 64, "every": 8, "base": {"kind": "kvzip", "chunk": 50}}
    config = FadeConfig(n_sink=2, recent_window=16, tile=16, ladder=[{"tier": "fp16"}], policy=policy)
    seed = fresh_seed()
    text = torch.randint(1, VOCABULARY, (1, 150), generator=torch.Generator().manual_seed(seed))
    found = divergence(tiny("llama", seed, torch.float32), [text], config, prompt_tokens=130, steps=12)
    assert found.held.cache < found.held.exact
