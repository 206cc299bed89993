"""The server of ``examples/continuous_batching.py``, which is what the tests of rows drive."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import torch
from tinymodels import left_padded

_FILE = Path(__file__).parents[1] / "examples" / "continuous_batching.py"
_SPEC = importlib.util.spec_from_file_location("continuous_batching", _FILE)
assert _SPEC is not None
assert _SPEC.loader is not None
example = importlib.util.module_from_spec(_SPEC)
sys.modules["continuous_batching"] = example
_SPEC.loader.exec_module(example)

Request, Server, alone = example.Request, example.Server, example.alone


@torch.no_grad()
def admit_together(server: Server, requests: list[Request]) -> None:  # type: ignore[valid-type]
    """Run several prompts at once, padded on the left, through the server's empty cache."""
    batch = left_padded([request.prompt for request in requests])
    positions = (batch["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    out = server.model(**batch, position_ids=positions, past_key_values=server.cache, use_cache=True)
    for request, logits in zip(requests, out.logits[:, -1], strict=True):
        request.said.append(int(logits.argmax()))
    server.rows = list(requests)
