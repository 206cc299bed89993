from __future__ import annotations

import pytest
import torch

from fade_core.errors import CheckpointError, ConfigError
from fade_quant_rotated.rotation import Rotation, hadamard


@pytest.mark.parametrize("n", [1, 2, 3, 12, 20, 28, 36, 64, 72, 80, 92, 96, 112, 128, 160, 192, 256])
def test_hadamard_is_orthonormal(n: int) -> None:
    h = hadamard(n, torch.float64)
    torch.testing.assert_close(h @ h.T, torch.eye(n, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("n", [64, 80, 96, 112, 128, 192, 256])
def test_common_head_dims_mix_every_channel_evenly(n: int) -> None:
    h = hadamard(n, torch.float64)
    torch.testing.assert_close(h.abs(), torch.full_like(h, n**-0.5), atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("n", [5, 64, 80, 112])
def test_inverse_undoes_forward_and_keeps_inner_products(kind: str, n: int, seed: int) -> None:
    rotation = Rotation(n, kind, seed)
    x, y = torch.randn(2, 3, 7, n, dtype=torch.float64)
    rotated = rotation.forward(x)
    assert not torch.allclose(rotated, x)
    tolerance = 1e-5 if kind == "orthogonal" else 1e-12  # Q is kept in float32
    torch.testing.assert_close(rotation.inverse(rotated), x, atol=tolerance, rtol=0)
    torch.testing.assert_close((rotated * rotation.forward(y)).sum(-1), (x * y).sum(-1), atol=n * tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_seed_decides_and_state_restores(kind: str, seed: int) -> None:
    x = torch.randn(4, 48)
    one, same, other = Rotation(48, kind, seed), Rotation(48, kind, seed), Rotation(48, kind, seed + 1)
    assert torch.equal(one.forward(x), same.forward(x))
    assert not torch.equal(one.forward(x), other.forward(x))
    other.load_state_dict(one.state_dict())
    assert torch.equal(one.forward(x), other.forward(x))


def test_refusals_say_what_would_work() -> None:
    with pytest.raises(ConfigError, match="hadamard"):
        Rotation(64, "fourier")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="configuration"):
        Rotation(64).load_state_dict(Rotation(32).state_dict())
