"""A prompt goes into a cache of fixed size without keeping the GPU waiting for the host."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from test_kernel_cache import SHORT, model
from transformers import DynamicCache

from fade_core import FadeConfig, create_tiered_cache


@torch.no_grad()
def waits(llama: Any, warm: Any, cache: Any) -> int:
    """Operations in which the host waits for the GPU while a prompt goes into ``cache``; into ``warm`` one went before."""
    ids = torch.randint(1, 64, (2, 300), device="cuda")
    llama(ids, past_key_values=warm, use_cache=True)
    if warm is cache:
        cache.reset()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            llama(ids, past_key_values=cache, use_cache=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in seen)


@pytest.mark.gpu
def test_the_host_waits_once_for_all_layers() -> None:
    llama = model("cuda")
    without = waits(llama, *(DynamicCache(config=llama.config) for _ in range(2)))
    with create_tiered_cache(llama, FadeConfig(**SHORT), max_cache_len=512) as cache:
        assert waits(llama, cache, cache) <= without + 1
