"""Decode steps of a fixed cache compile: one graph, compiled once, no host read, addresses for good."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_modes import FAMILIES, PACKED, model_of
from tinymodels import fresh_seed, left_padded, prompt
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, PreTrainedModel

from fade_core import FadeConfig, TieredKVCache, create_tiered_cache
from fade_core.errors import InputError

CONFIG = PACKED["channel_keys"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class NoHostRead(TorchDispatchMode):
    """Fails where a tensor is read on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default):
            raise AssertionError(f"{func} reads a tensor on the host")
        return func(*args, **kwargs or {})


def compiling(counter: CompileCounterWithBackend) -> CompileConfig:
    config = CompileConfig(fullgraph=True, dynamic=None, backend=counter, mode=None)
    config._compile_all_devices = True
    return config


def generate(model: PreTrainedModel, cache: TieredKVCache, inputs: dict[str, Tensor], new: int, **options: Any) -> Tensor:
    model.__dict__.pop("_compiled_call", None)
    settings: dict[str, Any] = {"do_sample": False, "min_new_tokens": new} | options
    out: Tensor = model.generate(**inputs, past_key_values=cache, max_new_tokens=new, **settings)
    return out


def rows() -> dict[str, Tensor]:
    return left_padded([prompt(i, length)[0] for i, length in enumerate((33, 50, 21))])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gemma3_text"])
def test_generate_compiles_one_graph_for_200_tokens(family: str, backend: str) -> None:
    model, inputs = model_of(family), rows()
    with create_tiered_cache(model, CONFIG) as growing:
        wanted = generate(model, growing, inputs, 200)
    counter = CompileCounterWithBackend(backend)
    with create_tiered_cache(model, CONFIG, max_cache_len=400) as cache, torch._dynamo.config.patch(
        error_on_recompile=True
    ):
        found = generate(model, cache, inputs, 200, compile_config=compiling(counter))
        assert torch.equal(found, wanted)
        assert counter.frame_count == 1
        assert cache.get_seq_length() == growing.get_seq_length()
