"""What FADE recommends has a Triton kernel for every op of a step: presets, examples and the README's configuration.

The kernels are asked whether they take what a cache gives them, and the references then compute it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tinymodels import fresh_seed, tiny

from fade_core import FadeConfig, attention_mass, create_tiered_cache
from fade_core.builtin.telemetry import Collector
from fade_core.ops.reference import TorchAppend, decode_attention
from fade_core.plugins import default_registry

ROOT = Path(__file__).parents[1]
WITHOUT = {
    "calibrated.toml": "widths and levels that a kernel does not read; calibrated_gpu.toml has those that it does",
    "self_calibrated.toml": "widths and levels that a kernel does not read; the preset 'compact' has those that it does",
}
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.toml"))
PRESETS = ("safe", "balanced", "aggressive", "compact", "faithful")


@pytest.fixture
def _triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels, told that they run here; what they accept goes to the references."""
    pytest.importorskip("triton")
    from fade_kernels_triton import append, dequantize, encode, kernel, mass

    for module in (append, dequantize, encode, kernel, mass):
        monkeypatch.setattr(module, "unusable", lambda device: "")
    reference = TorchAppend()
    monkeypatch.setattr(append.TritonAppend, "__call__", lambda _, *args: reference(*args))
    monkeypatch.setattr(
        kernel.TritonDecodeAttention, "__call__", lambda _, *args, **options: decode_attention(*args, **options)
    )
    monkeypatch.setattr(mass.TritonAttentionMass, "observes", False)
    monkeypatch.setattr(mass.TritonAttentionMass, "__call__", lambda _, *args: attention_mass(*args))


def steps_of(config: FadeConfig) -> set[str]:
    """Why calls of a prompt and of steps that pack a tile were not taken by the kernels."""
    seed = fresh_seed()
    shape = {
        "head_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
    }
    model = tiny("llama", seed, torch.bfloat16, **shape)
    kernels = {"decode_attention": "triton", "append": "triton"}
    if config.policy.kind == "h2o":
        kernels["attention_mass"] = "triton"
    cache, sink = (
        create_tiered_cache(model, FadeConfig.model_validate(config.model_dump() | {"kernel": kernels})),
        Collector(),
    )
    cache.sinks.append(sink)
    ids = torch.randint(1, model.config.vocab_size, (1, 400), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad(), cache:
        model(ids, past_key_values=cache)
        for _ in range(2):
            model(ids[:, :1], past_key_values=cache)
    assert {plan.attention.name for plan in plans(cache)} == {"triton"}
    assert any(bool(store.table.used.host.any()) for layer in cache.tiered for store in layer.held.stores)
    return {str(event.detail) for event in sink.events if event.kind == "fallback"}


def plans(cache: Any) -> list[Any]:
    return [layer.steps.step_plan for layer in cache.tiered]


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    assert steps_of(FadeConfig.preset(name)) == set()


def test_every_preset_is_listed() -> None:
    assert set(default_registry().names("presets")) == set(PRESETS)


@pytest.mark.usefixtures("_triton")
def test_the_configuration_of_the_readme(tmp_path: Path) -> None:
    block = re.search(r"```toml\n(n_sink.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block
    file = tmp_path / "readme.toml"
    file.write_text(block[1])
    assert steps_of(FadeConfig.from_file(file)) == set()


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize("name", [name for name in EXAMPLES if "file" not in (ROOT / "examples" / name).read_text()])
def test_examples(name: str) -> None:
    refused = steps_of(FadeConfig.from_file(ROOT / "examples" / name))
    assert bool(refused) == (name in WITHOUT), refused
