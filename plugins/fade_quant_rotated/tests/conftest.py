"""Shared by this plugin's tests: fresh random inputs whose seed is printed."""

from __future__ import annotations

import os
import time

import pytest
import torch


@pytest.fixture
def seed() -> int:
    """FADE_SEED, or a new one; printed so that a failure can be repeated."""
    chosen = int(os.environ.get("FADE_SEED", time.time_ns() % 2**31))
    print(f"FADE_SEED={chosen}")
    torch.manual_seed(chosen)
    return chosen
