from __future__ import annotations

import os
import time

import pytest
import torch


@pytest.fixture
def seed() -> int:
    chosen = int(os.environ.get("FADE_SEED") or time.time_ns() % 2**31)
    print(f"FADE_SEED={chosen}")
    return chosen


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
