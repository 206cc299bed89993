from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from fade_core.errors import InputError
from fade_quant_rotated import Calibration, load_codebooks
from fade_quant_rotated.plugin import fade_commands

transformers = pytest.importorskip("transformers")


class Letters:
    """A tokenizer of single characters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 97 for letter in text]}


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, seed: int) -> typer.Typer:
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    monkeypatch.setattr("fade_core.load_model", lambda *_, **__: (model, Letters()))
    app = typer.Typer()
    fade_commands(app)
    return app


@pytest.fixture
def text(tmp_path: Path) -> Path:
    letters = torch.randint(32, 126, (2000,)).tolist()
    path = tmp_path / "text.txt"
    path.write_text("".join(map(chr, letters)))
    return path


def test_calibrate_writes_a_file_and_says_what_it_cost(app: typer.Typer, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "calibration.safetensors"
    arguments = [
        "calibrate",
        "--text",
        str(text),
        "-o",
        str(output),
        "--bits",
        "2.5",
        "--length",
        "200",
        "--group",
        "4",
    ]
    result = CliRunner().invoke(app, [*arguments, "--widths", "0,2,4"])
    assert result.exit_code == 0, result.output
    for words in ("2,000 tokens", "peak memory", "At 2.5 bits", 'kind = "calibrated"'):
        assert words in result.output
    found = Calibration.load(output)
    assert found.defaults == {"bits": 2.5, "widths": [0, 2, 4], "group": 4}
    assert found.notes["texts"] == 10


def test_train_codebook_writes_what_set_codebooks_takes(app: typer.Typer, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "books.safetensors"
    sizes = ["--sub-dim", "8", "--num-centroids", "16", "--length", "200"]
    result = CliRunner().invoke(app, ["train-codebook", "--text", str(text), "-o", str(output), *sizes])
    assert result.exit_code == 0, result.output
    assert "4 codebooks" in result.output and "0.5 bits an element" in result.output
    assert {name: tuple(t.shape) for name, t in load_codebooks(output).items()} == {
        f"{layer}.{side}.centroids": (2, 16, 8) for layer in (0, 1) for side in ("keys", "values")
    }


@pytest.mark.parametrize("command", [["calibrate"], ["train-codebook", "--num-centroids", "16", "--seed", "3"]])
def test_what_is_written_repeats_byte_for_byte(
    app: typer.Typer, text: Path, tmp_path: Path, command: list[str]
) -> None:
    written = []
    for name in ("a", "b"):
        output = tmp_path / name
        result = CliRunner().invoke(app, [*command, "--text", str(text), "-o", str(output), "--length", "200"])
        assert result.exit_code == 0, result.output
        written.append(output.read_bytes())
    assert written[0] == written[1]


def test_wrong_paths_are_refused_before_the_model_is_loaded(app: typer.Typer, text: Path, tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["calibrate", "--text", str(tmp_path / "none"), "-o", str(tmp_path / "x")])
    assert isinstance(missing.exception, InputError) and "cannot be read" in str(missing.exception)
    nowhere = tmp_path / "none" / "x"
    for command in ("calibrate", "train-codebook"):
        lost = CliRunner().invoke(app, [command, "--text", str(text), "-o", str(nowhere)])
        assert isinstance(lost.exception, InputError) and "no folder" in str(lost.exception)
