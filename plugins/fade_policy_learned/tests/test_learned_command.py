from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from fade_core import FadeConfig, create_tiered_cache
from fade_core.errors import InputError
from fade_policy_learned import Geometry, LearnedPolicy
from fade_policy_learned.agreement import agreement
from fade_policy_learned.plugin import fade_commands

SHORT = ["--length", "160", "--future", "32", "--window", "16", "--epochs", "2"]


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 64 for letter in text]}


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, model: LlamaForCausalLM) -> typer.Typer:
    monkeypatch.setattr("fade_core.load_model", lambda *_, **__: (model, Letters()))
    app = typer.Typer()
    app.callback()(lambda: None)  # one command alone would be the whole application
    fade_commands(app)
    return app


@pytest.fixture
def text(tmp_path: Path, generator: torch.Generator) -> Path:
    letters = torch.randint(32, 126, (900,), generator=generator).tolist()
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, letters)))
    return path


def test_writes_a_policy_and_says_what_it_is_worth(
    app: typer.Typer, text: Path, tmp_path: Path, model: LlamaForCausalLM
) -> None:
    output = tmp_path / "policy.safetensors"
    result = CliRunner().invoke(app, ["train-policy", "--text", str(text), "-o", str(output), *SHORT])
    assert result.exit_code == 0, result.output
    for words in (
        "800 tokens",
        "peak memory",
        "R2",
        "rank correlation",
        "normalised h2o",
        "recency",
        'kind = "learned"',
    ):
        assert words in result.output
    policy = LearnedPolicy.load(output)
    assert policy.geometry == Geometry(2, 2, 16)
    assert policy.notes["texts"] == ["text.txt"] and policy.notes["tokens"] == 800
    config = FadeConfig(
        n_sink=2, recent_window=16, policy={"kind": "learned", "checkpoint": str(output), "budget": 0.5}
    )
    with create_tiered_cache(model, config) as cache:
        prompt = torch.randint(64, (1, 300))
        model.generate(prompt, past_key_values=cache, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert cache.compression_ratio() > 1.3


def test_what_is_written_repeats_byte_for_byte(app: typer.Typer, text: Path, tmp_path: Path) -> None:
    written = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        output = tmp_path / name
        arguments = ["train-policy", "--text", str(text), "-o", str(output), "--seed", seed, *SHORT]
        result = CliRunner().invoke(app, [*arguments, "--target", "mass"])
        assert result.exit_code == 0, result.output
        written.append(output.read_bytes())
    assert written[0] == written[1] != written[2]


def test_bad_input_is_refused_with_advice(app: typer.Typer, text: Path, tmp_path: Path) -> None:
    def failure(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["train-policy", *arguments])
        assert isinstance(result.exception, InputError), result.output
        return str(result.exception)

    output = str(tmp_path / "x")
    assert "cannot be read" in failure("--text", str(tmp_path / "none"), "-o", output)
    assert "no folder" in failure("--text", str(text), "-o", str(tmp_path / "none" / "x"))
    assert "fill 0 pieces of 1024 tokens; two are needed" in failure("--text", str(text), "-o", output)
    assert "held_out must lie between" in failure("--text", str(text), "-o", output, *SHORT, "--held-out", "1.5")


def test_agreement_against_its_definition() -> None:
    worth = torch.tensor([8.0, 4, 2, 2, 1, 0, 0, 0])
    lists = torch.tensor([5] * 4 + [9] * 3 + [2])
    found = agreement(torch.tensor([1.0, 9, 8, 2, 3, 2, 1, 7]), worth, lists)  # the last list has one token
    assert found.overlap_half == pytest.approx((0.5 + 1) / 2)
    assert found.worth_half == pytest.approx((6 / 16 + 1) / 2)
    assert found.worth_quarter == pytest.approx((4 / 16 + 1) / 2)
