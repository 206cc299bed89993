"""The real model, loaded once for all files here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct in float32, and its tokenizer."""
    from fade_core import load_model  # not above: the process that only hands out tests reads this file too

    model, tokenizer = load_model(smollm2_folder, device="cpu")
    model.generation_config.eos_token_id = None  # texts of one length, whatever a cache makes of them
    model.generation_config.pad_token_id = 0
    return model, tokenizer
