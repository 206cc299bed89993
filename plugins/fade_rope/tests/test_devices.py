"""Schemes follow their input to its device, and stay usable elsewhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fade_rope import scheme_from_config
from fade_rope.verification import relative_error

LONG = {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 32}
KINDS: dict[str, dict[str, Any]] = {"default": {}, "dynamic": {"factor": 2.0}, "longrope": LONG}


def scheme_of(kind: str) -> Any:
    parameters = {"rope_type": kind, "rope_theta": 1e4, **KINDS[kind]}
    return scheme_from_config(
        SimpleNamespace(model_type="llama", head_dim=16, max_position_embeddings=32, rope_parameters=parameters)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_another_device_does_not_spoil_this_one(kind: str, seed: int) -> None:
    scheme, x, positions = scheme_of(kind), torch.randn(1, 2, 5, 16), torch.randint(0, 90, (5,))
    before = scheme.rotate(x, positions)
    elsewhere = scheme.rotate(x.to("meta"), positions.to("meta"))
    assert elsewhere.device.type == "meta"
    assert torch.equal(scheme.rotate(x, positions), before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_cuda_agrees_with_the_cpu(kind: str, seed: int) -> None:
    scheme, x, positions = scheme_of(kind), torch.randn(2, 3, 9, 16), torch.randint(0, 64, (2, 9))
    for method, argument in ((scheme.rotate, positions), (scheme.unrotate, positions), (scheme.shift, positions - 40)):
        found = method(x.cuda(), argument.clamp(-31, 31).cuda())
        assert found.is_cuda
        assert relative_error(found.cpu(), method(x, argument.clamp(-31, 31))) <= 1e-5
